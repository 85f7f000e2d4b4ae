"""Several methods' sets measured against one real dataset, in one feature space."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from eval.metrics.planes import (
    Plane,
    TsneScores,
    class_planes,
    pca_plane,
    tsne_plane,
    tsne_scores,
)
from eval.metrics.set_metrics import RealFeatures, SetMetrics, measure
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.progress import progress, track

log = logging.getLogger(__name__)


class FeatureExtractor(Protocol):
    """Where images are compared: the features of a real dataset, and of any images."""

    def real(self, label: int) -> Tensor:
        """Features (N, D) of a class's real images."""

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, classes)."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All methods by name; planes and scores in them are of each method's first set."""

    metrics: Mapping[str, Sequence[SetMetrics]]  # of every set
    planes: Mapping[str, Plane]
    scores: Mapping[str, TsneScores]
    classes: Mapping[str, Plane]  # of each class alone; none unless they were asked for


def measure_sets(
    sets: Mapping[str, Sequence[DistilledDataset]],
    extract: FeatureExtractor,
    what: str,
    most_real: int | None = None,
    maps: Mapping[str, int] | None = None,
    unseen: Sequence[Tensor] | None = None,
    keep: Path | None = None,
) -> Measured:
    """Measure sets of one size; `what` they are stands beside the progress bar.

    `most_real` limits the real images of each class in the t-SNE plane; `maps` are classes, name
    and label, that get a plane of their own; `unseen` are features of real images that nothing was
    made from, (M, D) by class; `keep` is a folder for planes that were
    fitted.
    """
    pairs = [(name, distilled) for name, found in sets.items() for distilled in found]
    labels = range(len(pairs[0][1].classes))
    real = [
        extract.real(label)
        for label in track(labels, "measuring the real images", len(labels), "classes")
    ]
    known, metrics = RealFeatures(real), {name: list[SetMetrics]() for name in sets}
    first: dict[str, list[Tensor]] = {}
    images = sum(len(distilled.manifest["images"]) for _, distilled in pairs)
    with progress(f"measuring {what}", images, "images") as advance:
        for name, distilled in pairs:
            features = features_by_class(distilled, extract, advance)
            metrics[name].append(measure(known, features, unseen=unseen))
            first.setdefault(name, features)
    log.info("drawing maps of %s", what)
    planes = {"t-SNE": tsne_plane(real, first, most_real, keep=keep), "PCA": pca_plane(real, first)}
    return Measured(
        metrics=metrics,
        planes=planes,
        scores=tsne_scores(planes["t-SNE"]),
        classes=class_planes(real, first, maps or {}, keep),
    )


def features_by_class(
    distilled: DistilledDataset,
    extract: FeatureExtractor,
    advance: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Features (K, D) of each class's images, in label order; `advance` is called after each."""
    rows: list[list[Tensor]] = [[] for _ in distilled.classes]
    for image, label in distilled.images():
        rows[label].append(extract([image])[0][0])
        advance()
    return [torch.stack(features) for features in rows]

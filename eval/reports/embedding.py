"""A 2-D picture of real and distilled images for reports: t-SNE of small pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from eval.metrics.planes import Plane, tsne_plane
from eval.reports.drawings.maps import maps_picture
from eval.reports.samples import MOST_CLASSES
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.progress import track

_SIDE = 16  # pixels of the features' images
_MOST_REAL = 60  # per class
_FEWEST = 40  # images in all, below which a map shows nothing


def embedding_picture(
    dataset: RealDataset, sets: Mapping[str, DistilledDataset], keep: Path | None = None
) -> str:
    """An SVG: one panel per method, real images as dots, that method's as crosses.

    Its distances are not to be measured. Empty for sets too small to show.
    """
    planes = embedding_planes(dataset, sets, keep)
    return maps_picture(planes)[0] if planes else ""


def embedding_planes(
    dataset: RealDataset, sets: Mapping[str, DistilledDataset], keep: Path | None = None
) -> dict[str, Plane]:
    """One t-SNE fit of real and all methods' images shrunk to 16 px, of at most ten classes.

    Empty for sets too small to show. `keep` is a folder for what was fitted.
    """
    classes = range(min(len(dataset.classes), MOST_CLASSES))
    reading = track(classes, "reading real images for the map", len(classes), "classes")
    real = [_real(dataset, label) for label in reading]
    made: dict[str, list[Tensor]] = {}
    for method, distilled in sets.items():
        by_class: list[list[Tensor]] = [[] for _ in classes]
        for image, label in distilled.images():
            if label < len(by_class):
                by_class[label].append(_small(image))
        made[method] = [torch.stack(rows) for rows in by_class]
    if not sets or sum(map(len, real)) < _FEWEST:
        return {}
    return {"t-SNE of pixels": tsne_plane(real, made, keep=keep)}


def _real(dataset: RealDataset, label: int) -> Tensor:
    rows = []
    for image in dataset.images("train", label)[:_MOST_REAL]:
        try:
            rows.append(_small(image.decode()))
        except Exception:  # a damaged file that dataset.skip_broken left out, whatever it raises
            continue
    return torch.stack(rows)


def _small(image: Image.Image) -> Tensor:
    from eval.images import student_pixels

    return student_pixels(image, _SIDE).float().flatten() / 255

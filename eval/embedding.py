"""A 2-D picture of real and distilled images: t-SNE of small pixels, one colour per class."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from eval.test_images import student_pixels
from mgd3.datasets import RealDataset
from mgd3.distilled import DistilledDataset

_SIDE = 16  # pixels of the features' images
_MOST_CLASSES = 10
_MOST_REAL = 60  # per class


def embedding_picture(dataset: RealDataset, sets: Mapping[str, DistilledDataset]) -> str:
    """An SVG: one panel per method, real images as dots, that method's as crosses.

    Features are the pixels of images shrunk to 16 px, first reduced by PCA to 30 dimensions; all
    panels share one t-SNE fit (perplexity 30, seed 42). t-SNE distances are not to be measured.
    """
    features, labels, source = _features(dataset, sets)
    if len(features) < 40 or not sets:
        return ""
    reduced = PCA(min(30, *features.shape), random_state=0).fit_transform(features)
    points = TSNE(2, random_state=42, init="pca", learning_rate="auto").fit_transform(reduced)
    figure, panels = plt.subplots(
        1, len(sets), figsize=(4 * len(sets), 4), squeeze=False, layout="constrained"
    )
    colours = plt.get_cmap("tab10")(labels % 10)
    real = source == "real"
    for panel, method in zip(panels[0], sets, strict=True):
        mine = source == method
        panel.scatter(*points[real].T, c=colours[real], s=6, alpha=0.25, linewidths=0)
        panel.scatter(
            *points[mine].T, c=colours[mine], s=34, marker="X", edgecolors="black", linewidths=0.6
        )
        panel.set(title=method, xticks=[], yticks=[])
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _features(
    dataset: RealDataset, sets: Mapping[str, DistilledDataset]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, labels, source = [], [], []
    for label in range(min(len(dataset.classes), _MOST_CLASSES)):
        for real in dataset.images("train", label)[:_MOST_REAL]:
            try:
                rows.append(_small(real.decode()))
            except (OSError, SyntaxError):  # a damaged file that dataset.skip_broken left out
                continue
            labels.append(label)
            source.append("real")
    for method, distilled in sets.items():
        for image, label in distilled.images():
            if label < _MOST_CLASSES:
                rows.append(_small(image))
                labels.append(label)
                source.append(method)
    return np.array(rows), np.array(labels), np.array(source)


def _small(image: Image.Image) -> np.ndarray:
    return student_pixels(image, _SIDE).float().flatten().numpy() / 255

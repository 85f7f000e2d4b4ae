"""Looking at distilled sets: their first images, as strips and as one overview picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import matplotlib
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from eval.images import student_pixels
from eval.reports.pictures import png
from mgd3.data.distilled import DistilledDataset
from mgd3.data.previews import load_previews
from mgd3.runtime import checks

MOST_CLASSES, MOST_IMAGES, MOST_PIXELS = 10, 10, 64


def first_of_each_method(sets: Sequence[DistilledDataset]) -> dict[str, DistilledDataset]:
    """The lowest seed's set of each method; mgd3 first, because its modes stand beside it."""
    found: dict[str, DistilledDataset] = {}
    for distilled in sorted(sets, key=lambda d: d.manifest["seed"]):
        found.setdefault(distilled.manifest["method"], distilled)
    return dict(sorted(found.items(), key=lambda item: item[0] != "mgd3"))


def first_images(distilled: DistilledDataset) -> dict[str, Tensor]:
    """By wnid of the first ten classes: the first ten images, (K, 3, s, s) uint8."""
    wnids = [c.wnid for c in distilled.classes]
    found: dict[str, list[Image.Image]] = {w: [] for w in wnids[:MOST_CLASSES]}
    for image, label in distilled.images():
        if label < MOST_CLASSES and len(found[wnids[label]]) < MOST_IMAGES:
            found[wnids[label]].append(image)
    smallest = min(side for images in found.values() for i in images for side in i.size)
    size = min(MOST_PIXELS, smallest)
    return {w: torch.stack([student_pixels(i, size) for i in ims]) for w, ims in found.items()}


def image_strips(distilled: DistilledDataset) -> list[tuple[bytes, str]]:
    """One PNG strip per class (at most ten) with its name, for a tracker."""
    names = {c.wnid: c.name for c in distilled.classes}
    return [
        (png(make_grid(images, nrow=MOST_IMAGES, padding=1)), names[wnid])
        for wnid, images in first_images(distilled).items()
    ]


def overview_panels(
    sets: Sequence[DistilledDataset], methods: Sequence[str], real: bool
) -> dict[str, Tensor]:
    """Images (classes * images, 3, s, s) by panel: each method's, before them the first's modes.

    `real` False leaves the modes out, for pictures that may not show real images: the centroid of
    a cluster of one is a real image too.
    """
    first = first_of_each_method(sets)
    panels: dict[str, Tensor] = {}
    for method in methods:
        distilled = first[checks.choice("--methods", method, list(first))]
        previews = load_previews(distilled.folder)
        if real and previews and not panels:
            shown = [previews[c.wnid] for c in distilled.classes[:MOST_CLASSES]]
            panels["mode centroids, decoded"] = torch.cat([centroids for centroids, _ in shown])
            panels["nearest real images"] = torch.cat([nearest for _, nearest in shown])
        panels[method] = torch.cat(list(first_images(distilled).values()))
    return panels


def overview_picture(sets: Sequence[DistilledDataset], methods: Sequence[str], real: bool) -> bytes:
    """A PNG of `overview_panels` side by side, a row per class."""
    return _side_by_side(overview_panels(sets, methods, real), min(MOST_IMAGES, sets[0].ipc))


def overview_of(sets: Mapping[str, DistilledDataset]) -> bytes:
    """A PNG of named sets side by side, a row per class."""
    panels = {name: torch.cat(list(first_images(d).values())) for name, d in sets.items()}
    return _side_by_side(panels, min(MOST_IMAGES, next(iter(sets.values())).ipc))


def _side_by_side(panels: Mapping[str, Tensor], columns: int) -> bytes:
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 * len(panels), 3.5), squeeze=False, layout="constrained"
    )
    for panel, (title, images) in zip(axes[0], panels.items(), strict=True):
        grid = make_grid(images, nrow=columns, padding=1, pad_value=255)
        panel.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
        panel.set_title(title)
        panel.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200 if images.shape[-1] > 16 else 110)
    plt.close(figure)
    return buffer.getvalue()

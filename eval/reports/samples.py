"""Looking at distilled sets: their first images, as strips and as one overview picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from eval.reports.drawings.figures import as_png, drawing, panels
from eval.reports.drawings.pictures import grid, png
from eval.results.statistics import seed_order
from mgd3.data.distilled import DistilledDataset
from mgd3.data.previews import load_previews
from mgd3.runtime import checks

MOST_CLASSES, MOST_IMAGES, MOST_PIXELS = 10, 10, 64


def first_of_each(
    sets: Sequence[DistilledDataset], names: Sequence[str]
) -> dict[str, DistilledDataset]:
    """The lowest seed's set of each name; first the one whose modes are shown beside it."""
    found: dict[str, DistilledDataset] = {}
    for name, distilled in zip(names, sets, strict=True):
        old = found.get(name)
        if old is None or _seed(distilled) < _seed(old):
            found[name] = distilled
    shown = with_previews(found)
    return dict(sorted(found.items(), key=lambda item: item[0] != shown))


def _seed(distilled: DistilledDataset) -> int:
    return seed_order(distilled.manifest.get("seed"))


def with_previews(sets: Mapping[str, DistilledDataset]) -> str | None:
    """The last of named sets that has previews of its modes: tables end in the whole method."""
    return next((name for name in [*sets][::-1] if load_previews(sets[name].folder)), None)


def first_images(distilled: DistilledDataset) -> dict[str, Tensor]:
    """By wnid of the first ten classes: the first ten images, (K, 3, s, s) uint8."""
    from eval.images import student_pixels

    wnids = [c.wnid for c in distilled.classes]
    found: dict[str, list[Image.Image]] = {w: [] for w in wnids[:MOST_CLASSES]}
    most = min(MOST_IMAGES, distilled.ipc)
    for image, label in distilled.images():
        if label >= MOST_CLASSES and all(len(images) >= most for images in found.values()):
            break  # a set lists its images class by class
        if label < MOST_CLASSES and len(found[wnids[label]]) < MOST_IMAGES:
            found[wnids[label]].append(image)
    smallest = min(side for images in found.values() for i in images for side in i.size)
    size = min(MOST_PIXELS, smallest)
    return {w: torch.stack([student_pixels(i, size) for i in ims]) for w, ims in found.items()}


def image_strips(distilled: DistilledDataset) -> list[tuple[bytes, str]]:
    """One PNG strip per class (at most ten) with its name, for a tracker."""
    names = {c.wnid: c.name for c in distilled.classes}
    return [
        (png(grid(images, MOST_IMAGES)), names[wnid])
        for wnid, images in first_images(distilled).items()
    ]


def overview_panels(
    sets: Sequence[DistilledDataset], methods: Sequence[str], real: bool
) -> dict[str, Tensor]:
    """Images (classes * images, 3, s, s) by panel: each method's, before them the first's modes.

    `real` False leaves the modes out, for pictures that may not show real images: the centroid of
    a cluster of one is a real image too.
    """
    first = first_of_each(sets, [d.manifest["method"] for d in sets])
    found: dict[str, Tensor] = {}
    for method in methods:
        distilled = first[checks.choice("methods", method, list(first))]
        previews = load_previews(distilled.folder)
        if real and previews and not found:
            shown = [previews[c.wnid] for c in distilled.classes[:MOST_CLASSES]]
            found["mode centroids, decoded"] = torch.cat([centroids for centroids, _ in shown])
            found["nearest real images"] = torch.cat([nearest for _, nearest in shown])
        found[method] = torch.cat(list(first_images(distilled).values()))
    return found


def overview_picture(sets: Sequence[DistilledDataset], methods: Sequence[str], real: bool) -> bytes:
    """A PNG of `overview_panels` side by side, a row per class."""
    return _side_by_side(overview_panels(sets, methods, real), min(MOST_IMAGES, sets[0].ipc))


def overview_of(sets: Mapping[str, DistilledDataset]) -> bytes:
    """A PNG of named sets side by side, a row per class."""
    found = {name: torch.cat(list(first_images(d).values())) for name, d in sets.items()}
    return _side_by_side(found, min(MOST_IMAGES, next(iter(sets.values())).ipc))


def _side_by_side(found: Mapping[str, Tensor], columns: int) -> bytes:
    sheets = {title: grid(images, columns, pad_value=255) for title, images in found.items()}
    _, high, wide = next(iter(sheets.values())).shape
    with drawing():
        size = 3.2 * len(found), 3.2 * high / wide + 0.5  # inches; a line for the titles
        figure, axes = panels(1, len(found), size)
        for axis, (title, sheet) in zip(axes[0], sheets.items(), strict=True):
            axis.imshow(sheet.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_title(title)
            axis.axis("off")
        largest = max(images.shape[-1] for images in found.values())
        return as_png(figure, dpi=200 if largest > 16 else 110)

"""How far one method moves another's images, beside what another seed moves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import fmean
from typing import Any

import numpy as np

from eval.results.layout import NONE, Layout
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.progress import track

Sets = Mapping[str, Sequence[DistilledDataset]]  # by method
_Image = tuple[DistilledDataset, Mapping[str, Any]]  # a set, and an entry of its manifest


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Two methods' images of the same noise streams; or one's, of two seeds."""

    first: str
    second: str | None  # None: the first of another seed
    rms: float  # root mean square over an image's pixels in [0, 1], mean over images
    images: int


def image_shifts(methods: Sets) -> list[Shift]:
    """Every pair of methods that share noise streams, the least moved first; then every method.

    A method's images of one seed are compared with those of its next seed, place by place. Images
    of two sizes do not count.
    """
    streams: dict[str, dict[str, _Image]] = defaultdict(dict)  # by noise stream and method
    for name, found in methods.items():
        for distilled in found:
            for image in _generated(distilled):
                streams[image[1]["noise_stream"]][name] = image
    apart: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    for of_stream in track(streams.values(), "comparing", len(streams), "noise streams"):
        pixels = {name: _pixels(*image) for name, image in of_stream.items()}
        for (first, ours), (second, theirs) in combinations(pixels.items(), 2):
            apart[first, second] += _rms(ours, theirs)
    for name, found in methods.items():
        for one, other in pairwise(found):
            for a, b in zip(_generated(one), _generated(other), strict=False):
                apart[name, None] += _rms(_pixels(*a), _pixels(*b))
    shifts = [
        Shift(first=first, second=second, rms=fmean(values), images=len(values))
        for (first, second), values in apart.items()
        if values
    ]
    return sorted(shifts, key=lambda shift: (shift.second is None, shift.rms))


def _generated(distilled: DistilledDataset) -> list[_Image]:
    """Entries of the manifest that have a noise stream: copies of real images have none."""
    entries = distilled.manifest["images"]
    return [(distilled, entry) for entry in entries if entry.get("noise_stream")]


def _pixels(distilled: DistilledDataset, entry: Mapping[str, Any]) -> np.ndarray:
    """(H, W, 3) in [0, 1]."""
    return np.asarray(distilled.image(entry).convert("RGB"), np.float32) / 255


def _rms(one: np.ndarray, other: np.ndarray) -> list[float]:
    """One value, or none where sizes differ."""
    return [float(np.sqrt(np.square(one - other).mean()))] if one.shape == other.shape else []


def shifts_layout(shifts: Sequence[Shift], title: str) -> Layout:
    """A line for each pair, with its share of what another seed moves the second one's images."""
    of_seed = {shift.first: shift.rms for shift in shifts if shift.second is None}
    lines = []
    for shift in shifts:
        share = of_seed.get(shift.second or "")
        lines.append(
            [
                shift.first,
                shift.second or "another seed of it",
                f"{shift.rms:.4f}",
                NONE if not share else f"{100 * shift.rms / share:.1f} %",
                str(shift.images),
            ]
        )
    headers = ["method", "beside", "RMS of pixels in [0, 1]", "of another seed", "images"]
    return Layout(title=title, headers=headers, lines=lines)

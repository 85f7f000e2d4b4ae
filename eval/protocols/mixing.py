"""CutMix: one box of every image of a batch comes from another image (Yun et al. 2019)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Mix(NamedTuple):
    """One box and one permutation for a batch of B images."""

    permutation: Tensor  # (B,): whose box each image gets
    box: tuple[int, int, int, int]  # top, bottom, left, right
    share: float  # of the image outside the box, by which the original labels count

    def of(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) with the box of `images[permutation]`."""
        top, bottom, left, right = self.box
        mixed = images.clone()
        mixed[:, :, top:bottom, left:right] = images[self.permutation, :, top:bottom, left:right]
        return mixed


def draw_mix(
    probability: float, count: int, size: tuple[int, int], generator: Generator
) -> Mix | None:
    """CutMix for `count` images of `size`, or with 1 - `probability` none; Beta(1, 1) shares."""
    if torch.rand((), generator=generator) >= probability:
        return None
    height, width = size
    lam = float(torch.rand((), generator=generator))  # Beta(1, 1) is uniform
    permutation = torch.randperm(count, generator=generator)
    top, bottom = _span(height, lam, generator)
    left, right = _span(width, lam, generator)
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return Mix(permutation, (top, bottom, left, right), share)


def _span(side: int, lam: float, generator: Generator) -> tuple[int, int]:
    cut = int(side * (1 - lam) ** 0.5)
    center = int(torch.randint(side, (), generator=generator))
    return max(center - cut // 2, 0), min(center + cut // 2, side)

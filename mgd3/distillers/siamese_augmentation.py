"""Differentiable siamese augmentation (Zhao & Bilen 2021): one operation, alike for all images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from mgd3.runtime import checks
from mgd3.runtime.compute import to_device

Operation = Callable[[Tensor], Tensor]


def _uniform(draw: Generator, low: float, high: float) -> float:
    return low + (high - low) * torch.rand((), generator=draw).item()


def _color(draw: Generator) -> Operation:
    """Brightness +- 0.5, saturation 0..2, contrast 0.5..1.5, in this order."""
    shift, saturation = _uniform(draw, -0.5, 0.5), _uniform(draw, 0.0, 2.0)
    contrast = _uniform(draw, 0.5, 1.5)

    def apply(x: Tensor) -> Tensor:
        x = x + shift
        grey = x.mean(dim=1, keepdim=True)
        x = (x - grey) * saturation + grey
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        return (x - mean) * contrast + mean

    return apply


def _crop(draw: Generator) -> Operation:
    """Shifted by up to an eighth of the sides, zeros come in."""
    right, down = _uniform(draw, -0.125, 0.125), _uniform(draw, -0.125, 0.125)

    def apply(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        by_y, by_x = round(down * height), round(right * width)
        padded = F.pad(x, (abs(by_x),) * 2 + (abs(by_y),) * 2)
        top, left = abs(by_y) + by_y, abs(by_x) + by_x
        return padded[..., top : top + height, left : left + width]

    return apply


def _cutout(draw: Generator) -> Operation:
    """A box of half the sides, around a random point, becomes zero."""
    at_y, at_x = _uniform(draw, 0, 1), _uniform(draw, 0, 1)

    def apply(x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        mask = torch.ones_like(x[:1, :1])
        top, left = round(at_y * height) - height // 4, round(at_x * width) - width // 4
        mask[
            ..., max(0, top) : max(0, top + height // 2), max(0, left) : max(0, left + width // 2)
        ] = 0
        return x * mask

    return apply


def _flip(draw: Generator) -> Operation:
    """Mirrored with probability 0.5."""
    mirrored = _uniform(draw, 0, 1) < 0.5
    return lambda x: x.flip(-1) if mirrored else x


def _affine(matrix: Sequence[Sequence[float]]) -> Operation:
    def apply(x: Tensor) -> Tensor:
        theta = to_device(torch.tensor(matrix, dtype=x.dtype), x.device).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=True)
        return F.grid_sample(x, grid, align_corners=True)

    return apply


def _scale(draw: Generator) -> Operation:
    """Each side by 1/1.2 to 1.2."""
    across, down = _uniform(draw, 1 / 1.2, 1.2), _uniform(draw, 1 / 1.2, 1.2)
    return _affine([[across, 0, 0], [0, down, 0]])


def _rotate(draw: Generator) -> Operation:
    """By up to 15 degrees."""
    angle = math.radians(_uniform(draw, -15, 15))
    return _affine([[math.cos(angle), math.sin(-angle), 0], [math.sin(angle), math.cos(angle), 0]])


_OPERATIONS: dict[str, Callable[[Generator], Operation]] = {
    "color": _color, "crop": _crop, "cutout": _cutout, "flip": _flip, "scale": _scale,
    "rotate": _rotate,
}  # fmt: skip


class SiameseAugmentation:
    """Draws one of the strategy's operations; what it returns can be applied to several batches."""

    def __init__(self, strategy: Sequence[str]) -> None:
        self.strategy = [
            checks.choice("method.augmentations", name, _OPERATIONS) for name in strategy
        ]

    def draw(self, generator: Generator) -> Operation:
        """A function of images (B, 3, H, W), the same for each of them and differentiable."""
        if not self.strategy:
            return lambda x: x
        pick = int(torch.randint(len(self.strategy), (), generator=generator))
        return _OPERATIONS[self.strategy[pick]](generator)

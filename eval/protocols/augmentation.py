"""The protocols' training transforms, batched on the device.

Random numbers come from a CPU generator, so that the CPU and the GPU see the same augmentations:
what a batch needs is drawn first (`draw`), moved at once, and then only computed with (`apply`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from eval.protocols.options import check_interval
from mgd3.runtime import checks

MEAN = (0.485, 0.456, 0.406)  # ImageNet's
STD = (0.229, 0.224, 0.225)
_LUMA = (0.299, 0.587, 0.114)
_EIGENVALUES = (0.2175, 0.0188, 0.0045)  # ImageNet's RGB covariance (Krizhevsky et al. 2012)
_EIGENVECTORS = (
    (-0.5675, 0.7192, 0.4009),
    (-0.5808, -0.0045, -0.8140),
    (-0.5836, -0.6948, 0.4203),
)
_RATIO = (3 / 4, 4 / 3)  # of RandomResizedCrop, torchvision's default
_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many


class Draws(NamedTuple):
    """What `Augmentation` does to each of B images."""

    boxes: Tensor  # (B, 4): top, left, height, width
    flips: Tensor  # (B,) bool
    order: Tensor  # (B, 3): the jitter's parts
    strengths: Tensor  # (B, 3): by place in that order
    lighting: Tensor  # (B, 3, 1, 1): added to the channels


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """RandomResizedCrop, flip, colour jitter, PCA lighting, normalisation, in order; then CutMix.

    `apply` does all but CutMix, which mixes targets too (mixing.py).
    """

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float  # probability
    jitter: float  # strength of brightness, contrast and saturation
    lighting: float  # standard deviation
    cutmix: float  # probability of a batch; the mixing share is Beta(1, 1), that is uniform

    def __post_init__(self) -> None:
        check_interval("protocol.augmentation.crop_scale", self.crop_scale)
        check_interval("protocol.augmentation.crop_ratio", self.crop_ratio, positive=True)
        checks.number("protocol.augmentation.flip", self.flip, minimum=0, maximum=1)
        checks.number("protocol.augmentation.jitter", self.jitter, minimum=0)
        checks.number("protocol.augmentation.lighting", self.lighting, minimum=0)
        checks.number("protocol.augmentation.cutmix", self.cutmix, minimum=0, maximum=1)

    @property
    def changes(self) -> bool:
        """Does it change any image? False if all of it is switched off."""
        whole = tuple(self.crop_scale) == tuple(self.crop_ratio) == (1, 1)
        return not whole or any((self.flip, self.jitter, self.lighting, self.cutmix))

    def mixed_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the images that CutMix mixes, where the set's have `size`."""
        return size

    def draw(self, count: int, size: tuple[int, int], generator: Generator) -> Draws:
        """For `count` images of `size`."""
        boxes = crop_boxes(count, size, self.crop_scale, self.crop_ratio, generator)
        flips = torch.rand(count, generator=generator) < self.flip
        order, strengths = draw_jitter(count, self.jitter, generator)
        lighting = lighting_shift(count, self.lighting, generator)
        return Draws(boxes, flips, order, strengths, lighting)

    def apply(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Pixels (B, 3, H, W) uint8 to normalised images of the same size, float32."""
        images = resized_crop(pixels.float() / 255, draws.boxes, draws.flips)
        if self.jitter:  # else nothing would change
            images = color_jitter(images, draws.order, draws.strengths)
        if self.lighting:
            images = images + draws.lighting
        return normalise(images)


class SoftDraws(NamedTuple):
    """What `SoftAugmentation` does to each of B images."""

    columns: Tensor | None  # (B, patches): the strips' order, None where they stay
    rows: Tensor | None
    boxes: Tensor  # (B, 4): top, left, height, width
    flips: Tensor  # (B,) bool


@dataclass(frozen=True, kw_only=True)
class SoftAugmentation:
    """RDED's: patches shuffled, antialiased RandomResizedCrop, flip, normalisation; then CutMix.

    `apply` does all but CutMix.
    """

    size: int  # pixels of the result
    patches: int  # strips per side; 1 shuffles nothing
    crop_scale: tuple[float, float]
    flip: float  # probability
    cutmix: float  # probability of a batch

    def __post_init__(self) -> None:
        checks.integer("protocol.augmentation.patches", self.patches, minimum=1)
        check_interval("protocol.augmentation.crop_scale", self.crop_scale)
        checks.number("protocol.augmentation.flip", self.flip, minimum=0, maximum=1)
        checks.number("protocol.augmentation.cutmix", self.cutmix, minimum=0, maximum=1)

    @property
    def changes(self) -> bool:
        """Does it change any image? False if all of it is switched off."""
        whole = tuple(self.crop_scale) == (1, 1)  # of a square, whatever the ratio
        return not whole or self.patches > 1 or any((self.flip, self.cutmix))

    def mixed_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Of the images that CutMix mixes, where the set's have `size`."""
        return self.size, self.size

    def draw(self, count: int, size: tuple[int, int], generator: Generator) -> SoftDraws:
        """For `count` images of `size`."""
        columns, rows = (draw_strips(count, self.patches, generator) for _ in range(2))
        boxes = crop_boxes(count, size, self.crop_scale, _RATIO, generator)
        return SoftDraws(columns, rows, boxes, torch.rand(count, generator=generator) < self.flip)

    def apply(self, pixels: Tensor, draws: SoftDraws) -> Tensor:
        """Pixels (B, 3, H, W) uint8 to normalised images (B, 3, size, size), float32."""
        pixels = shuffle_patches(pixels, draws.columns, draws.rows)
        return normalise(
            antialiased_crop(pixels.float() / 255, draws.boxes, draws.flips, self.size)
        )


def draw_strips(count: int, strips: int, generator: Generator) -> Tensor | None:
    """An order of `strips` strips for each image, (B, strips); None where there is but one."""
    return torch.rand(count, strips, generator=generator).argsort(dim=1) if strips > 1 else None


def shuffle_patches(images: Tensor, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    """Each image's vertical strips in an order of its own (B, strips), then its horizontal ones."""
    for side, order in ((3, columns), (2, rows)):
        if order is None:
            continue
        strip = images.shape[side] // order.shape[1]
        offsets = torch.arange(strip, device=images.device)
        index = (order[:, :, None] * strip + offsets).flatten(1)  # (B, length)
        shape = [len(images), 1, 1, 1]
        shape[side] = index.shape[1]
        images = images.gather(side, index.view(shape).expand_as(images))
    return images


def antialiased_crop(images: Tensor, boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Each image's box (top, left, height, width) resized to (B, 3, size, size), some mirrored.

    Bilinear with antialiasing, as torchvision's `resized_crop(antialias=True)`: both directions
    are products with a matrix of triangle filters.
    """
    top, left, height, width = boxes.to(images).unbind(dim=1)  # (B,) each
    rows = _triangle_filters(images.shape[-2], top, height, size)  # (B, size, H)
    columns = _triangle_filters(images.shape[-1], left, width, size)
    columns = torch.where(flips[:, None, None], columns.flip(1), columns)  # (B, size, W)
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def _triangle_filters(length: int, start: Tensor, extent: Tensor, size: int) -> Tensor:
    """Weights (B, size, length) that resize [start, start + extent) of a side to `size`."""
    scale = (extent / size)[:, None, None]  # (B, 1, 1)
    center = (torch.arange(size, device=start.device) + 0.5)[:, None] * scale  # (B, size, 1)
    position = torch.arange(length, device=start.device) + 0.5 - start[:, None, None]
    weights = (1 - (position - center).abs() / scale.clamp(min=1)).clamp(min=0)
    inside = (position > 0) & (position < extent[:, None, None])
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)


def normalise(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] to ImageNet's zero mean and unit deviation."""
    return (images - channels(MEAN, images.device)) / channels(STD, images.device)


@cache
def channels(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """A constant of each channel, (3, 1, 1), copied to a device once."""
    with torch.inference_mode(False):  # a test that comes first would else keep it from gradients
        return torch.tensor(values, device=device).view(3, 1, 1)


def crop_boxes(
    count: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    draw: Generator,
) -> Tensor:
    """torchvision's RandomResizedCrop boxes (B, 4) int64: top, left, height, width.

    Of ten candidates the first that fits; the whole image where none does.
    """
    height, width = size
    area = height * width * _uniform((count, _ATTEMPTS), *scale, draw)
    aspect = _uniform((count, _ATTEMPTS), math.log(ratio[0]), math.log(ratio[1]), draw).exp()
    w = (area * aspect).sqrt().round().long()  # (B, attempts)
    h = (area / aspect).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(dim=1, keepdim=True)  # (B, 1)
    any_fits = fits.any(dim=1)
    w = torch.where(any_fits, w.gather(1, first)[:, 0], width)
    h = torch.where(any_fits, h.gather(1, first)[:, 0], height)
    top = (torch.rand(count, generator=draw, dtype=torch.float64) * (height - h + 1)).long()
    left = (torch.rand(count, generator=draw, dtype=torch.float64) * (width - w + 1)).long()
    return torch.stack([top, left, h, w], dim=1)


def resized_crop(images: Tensor, boxes: Tensor, flips: Tensor) -> Tensor:
    """Each image's box, bilinearly resized to the image's size and mirrored where `flips`.

    Coordinates are held inside the box, as resizing the cropped image would.
    """
    height, width = images.shape[-2:]
    top, left, h, w = boxes.to(images).unbind(dim=1)  # (B,) each
    y = _source_coordinates(height, top, h)  # (B, H)
    x = _source_coordinates(width, left, w)  # (B, W)
    x = torch.where(flips[:, None], x.flip(1), x)
    grid = torch.stack(
        torch.broadcast_tensors(
            ((2 * x + 1) / width - 1)[:, None, :], ((2 * y + 1) / height - 1)[:, :, None]
        ),
        dim=-1,
    )  # (B, H, W, 2)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def draw_jitter(count: int, strength: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """An order of brightness, contrast, saturation and three strengths, (B, 3) each."""
    order = torch.rand(count, 3, generator=generator).argsort(dim=1)
    return order, _uniform((count, 3), -strength, strength, generator).float()


def color_jitter(images: Tensor, order: Tensor, strengths: Tensor) -> Tensor:
    """Brightness, contrast and saturation in an order of each image's own; no clamping.

    Each moves the image from or to its degenerate version by a ~ U(-strength, strength):
    img + a (target - img), target = black, its mean luma, or its luma image.
    """
    for position in range(3):
        kind = order[:, position].view(-1, 1, 1, 1)
        a = strengths[:, position].view(-1, 1, 1, 1)
        luma = (images * channels(_LUMA, images.device)).sum(dim=1, keepdim=True)  # (B, 1, H, W)
        mean = luma.mean(dim=(2, 3), keepdim=True)  # (B, 1, 1, 1)
        target = torch.where(kind == 2, luma, torch.where(kind == 1, mean, torch.zeros_like(mean)))
        images = torch.lerp(images, target.expand_as(images), a)
    return images


def lighting_shift(count: int, deviation: float, draw: Generator) -> Tensor:
    """PCA lighting: sum_j V[c][j] alpha_j L_j with alpha ~ N(0, deviation^2). (B, 3, 1, 1)"""
    alpha = deviation * torch.randn(count, 3, generator=draw)
    vectors, values = torch.tensor(_EIGENVECTORS), torch.tensor(_EIGENVALUES)
    return (alpha * values @ vectors.T)[:, :, None, None]


def _source_coordinates(size: int, start: Tensor, length: Tensor) -> Tensor:
    """Pixel-centre coordinates (B, size) in the image that a resize of the box reads."""
    out = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5  # (size,)
    inside = out[None] * (length / size)[:, None] - 0.5
    inside = inside.clamp(min=0).minimum((length - 1)[:, None])
    return inside + start[:, None]


def _uniform(shape: tuple[int, int], low: float, high: float, draw: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=draw, dtype=torch.float64)

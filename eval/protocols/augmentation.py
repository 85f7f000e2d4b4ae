"""The protocols' training transforms, batched on the device.

Random numbers come from a CPU generator, so that the CPU and the GPU see the same augmentations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """RandomResizedCrop, flip, colour jitter, PCA lighting, normalisation, in order; then CutMix.

    Calling it does all but CutMix, which mixes targets too.
    """

    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip: float  # probability
    jitter: float  # strength of brightness, contrast and saturation
    lighting: float  # standard deviation
    cutmix: float  # probability of a batch; the mixing share is Beta(1, 1), that is uniform

    def __post_init__(self) -> None:
        check_interval("protocol.augmentation.crop_scale", self.crop_scale)
        check_interval("protocol.augmentation.crop_ratio", self.crop_ratio)
        checks.number("protocol.augmentation.flip", self.flip, minimum=0, maximum=1)
        checks.number("protocol.augmentation.jitter", self.jitter, minimum=0)
        checks.number("protocol.augmentation.lighting", self.lighting, minimum=0)
        checks.number("protocol.augmentation.cutmix", self.cutmix, minimum=0, maximum=1)

    @property
    def changes(self) -> bool:
        """Does it change any image? False if all of it is switched off."""
        whole = tuple(self.crop_scale) == tuple(self.crop_ratio) == (1, 1)
        return not whole or any((self.flip, self.jitter, self.lighting, self.cutmix))

    def __call__(self, pixels: Tensor, draw: Generator) -> Tensor:
        """Pixels (B, 3, H, W) uint8 to normalised images of the same size, float32."""
        images = pixels.float() / 255
        boxes = crop_boxes(
            len(images),
            (images.shape[-2], images.shape[-1]),
            self.crop_scale,
            self.crop_ratio,
            draw,
        )
        flips = torch.rand(len(images), generator=draw) < self.flip
        images = resized_crop(images, boxes.to(images.device), flips.to(images.device))
        images = color_jitter(images, self.jitter, draw)
        images = images + lighting_shift(len(images), self.lighting, draw).to(images.device)
        return normalise(images)


@dataclass(frozen=True, kw_only=True)
class SoftAugmentation:
    """RDED's: patches shuffled, antialiased RandomResizedCrop, flip, normalisation; then CutMix.

    Calling it does all but CutMix.
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

    def __call__(self, pixels: Tensor, draw: Generator) -> Tensor:
        """Pixels (B, 3, H, W) uint8 to normalised images (B, 3, size, size), float32."""
        images = shuffle_patches(pixels, self.patches, draw).float() / 255
        height, width = images.shape[-2:]
        boxes = crop_boxes(len(images), (height, width), self.crop_scale, _RATIO, draw)
        flips = torch.rand(len(images), generator=draw) < self.flip
        images = antialiased_crop(
            images, boxes.to(images.device), flips.to(images.device), self.size
        )
        return normalise(images)


def shuffle_patches(images: Tensor, strips: int, draw: Generator) -> Tensor:
    """Each image's vertical strips in an order of its own, then its horizontal ones."""
    if strips == 1:
        return images
    for side in (3, 2):
        length = images.shape[side]
        order = torch.rand(len(images), strips, generator=draw).argsort(dim=1)  # (B, strips)
        offsets = torch.arange(length // strips)
        index = (order[:, :, None] * (length // strips) + offsets).flatten(1)  # (B, length)
        shape = [len(images), 1, 1, 1]
        shape[side] = length
        index = index.view(shape).expand_as(images).to(images.device)
        images = images.gather(side, index)
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
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
    return (images - mean) / std


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


def color_jitter(images: Tensor, strength: float, draw: Generator) -> Tensor:
    """Brightness, contrast and saturation in an order of each image's own; no clamping.

    Each moves the image from or to its degenerate version by a ~ U(-strength, strength):
    img + a (target - img), target = black, its mean luma, or its luma image.
    """
    count, device = len(images), images.device
    order = torch.rand(count, 3, generator=draw).argsort(dim=1).to(device)  # (B, 3)
    strengths = _uniform((count, 3), -strength, strength, draw).to(images)
    luma_weights = torch.tensor(_LUMA, device=device).view(1, 3, 1, 1)
    for position in range(3):
        kind = order[:, position].view(-1, 1, 1, 1)
        a = strengths[:, position].view(-1, 1, 1, 1)
        luma = (images * luma_weights).sum(dim=1, keepdim=True)  # (B, 1, H, W)
        mean = luma.mean(dim=(2, 3), keepdim=True)  # (B, 1, 1, 1)
        target = torch.where(kind == 2, luma, torch.where(kind == 1, mean, torch.zeros_like(mean)))
        images = torch.lerp(images, target.expand_as(images), a)
    return images


def lighting_shift(count: int, deviation: float, draw: Generator) -> Tensor:
    """PCA lighting: sum_j V[c][j] alpha_j L_j with alpha ~ N(0, deviation^2). (B, 3, 1, 1)"""
    alpha = deviation * torch.randn(count, 3, generator=draw)
    vectors, values = torch.tensor(_EIGENVECTORS), torch.tensor(_EIGENVALUES)
    return (alpha * values @ vectors.T)[:, :, None, None]


def cutmix(images: Tensor, draw: Generator) -> tuple[Tensor, Tensor, float]:
    """One box and one permutation for the batch (Yun et al. 2019); the share is Beta(1, 1).

    Returns images with the box of `images[permutation]`, the permutation (B,), and the share of
    the image outside the box, by which the original labels count.
    """
    height, width = images.shape[-2:]
    lam = float(torch.rand((), generator=draw))  # Beta(1, 1) is uniform
    permutation = torch.randperm(len(images), generator=draw).to(images.device)
    y0, y1 = _span(height, lam, draw)
    x0, x1 = _span(width, lam, draw)
    mixed = images.clone()
    mixed[:, :, y0:y1, x0:x1] = images[permutation, :, y0:y1, x0:x1]
    return mixed, permutation, 1 - (y1 - y0) * (x1 - x0) / (height * width)


def _span(side: int, lam: float, draw: Generator) -> tuple[int, int]:
    cut = int(side * (1 - lam) ** 0.5)
    center = int(torch.randint(side, (), generator=draw))
    return max(center - cut // 2, 0), min(center + cut // 2, side)


def _source_coordinates(size: int, start: Tensor, length: Tensor) -> Tensor:
    """Pixel-centre coordinates (B, size) in the image that a resize of the box reads."""
    out = torch.arange(size, device=start.device, dtype=start.dtype) + 0.5  # (size,)
    inside = out[None] * (length / size)[:, None] - 0.5
    inside = inside.clamp(min=0).minimum((length - 1)[:, None])
    return inside + start[:, None]


def _uniform(shape: tuple[int, int], low: float, high: float, draw: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=draw, dtype=torch.float64)

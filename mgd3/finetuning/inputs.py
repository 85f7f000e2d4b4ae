"""What a fine-tuning sees of images: fixed latents, or drawn and mirrored anew at each visit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from mgd3.backbones.contract import Codec
from mgd3.data.class_lists import ClassInfo
from mgd3.data.inventory import ClassImages
from mgd3.modes.latents import LatentCache


@dataclass(frozen=True)
class TrainingLatents:
    """Posteriors of N images and, where they are mirrored, of their mirror images.

    Minimax's trainer encodes a randomly mirrored image anew at each visit and draws from the
    posterior; with the moments of both kept, a visit costs a draw.
    """

    mean: Tensor  # (N, C, h, w)
    std: Tensor | None  # None: the mean stands for the image
    mirrored: tuple[Tensor, Tensor | None] | None
    flip: float  # probability of the mirror image

    def at(self, rows: Tensor, draw: Generator) -> Tensor:
        """Latents (B, C, h, w) of the images `rows` (B,), at one visit."""
        mean, std = self.mean[rows], None if self.std is None else self.std[rows]
        if self.mirrored is not None:
            other_mean, other_std = self.mirrored
            turned = (torch.rand(len(rows), generator=draw) < self.flip).view(-1, 1, 1, 1)
            mean = torch.where(turned, other_mean[rows], mean)
            if std is not None and other_std is not None:
                std = torch.where(turned, other_std[rows], std)
        if std is None:
            return mean
        return mean + std * torch.randn(mean.shape, generator=draw)

    def __len__(self) -> int:
        return len(self.mean)


def training_latents(
    classes: Sequence[tuple[ClassInfo, ClassImages]],
    codec: Codec,
    folder: Path,
    sampled: bool,
    flip: float,
    workers: int = 1,
) -> TrainingLatents:
    """The latents of some classes' images, one class after the other, encoded once per cache."""

    def moments(mirror: str) -> tuple[Tensor, Tensor | None]:
        cache = LatentCache(folder, codec, mirror, workers)
        with cache.encoding(classes, moments=True):
            found = [cache.moments(info, images) for info, images in classes]
        means, deviations = zip(*found, strict=True)
        return torch.cat(means), torch.cat(deviations) if sampled else None

    mean, std = moments("none")
    return TrainingLatents(mean, std, moments("all") if flip else None, flip)

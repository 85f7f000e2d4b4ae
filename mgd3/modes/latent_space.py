"""The space that modes are found in as a feature space: where the paper's planes are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mgd3.backbones.contract import Backbone
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.data.pixels import center_crop, from_pil, to_unit
from mgd3.modes.encoder import device_of
from mgd3.modes.latents import LatentCache
from mgd3.runtime.compute import to_device
from mgd3.runtime.errors import UserError


class LatentFeatures:
    """A backbone codec's posterior means, scaled and flattened (released tsne_plots.py)."""

    def __init__(self, backbone: Backbone, cache: Path, workers: int = 1) -> None:
        """`workers` threads decode.

        Raises `UserError` for a backbone that draws latents from their posterior.
        """
        if backbone.codec.samples_latents:
            raise UserError("metrics=vae_latents takes posterior means; set backbone.latents=mean")
        self._kept = LatentCache(cache / "latents", backbone.codec, "none", workers)

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> RealLatents:
        """The space with the real images in it; each class is encoded when it is asked for."""
        return RealLatents(self._kept, dataset, inventory)


@dataclass(frozen=True)
class RealLatents:
    """Latents (·, C h w) of real images, as mode discovery keeps them, and of any others."""

    kept: LatentCache
    dataset: RealDataset
    inventory: Sequence[ClassImages]

    def real(self, label: int) -> Tensor:
        """Latents (N, C h w) of a class's real images, in their order, without mirrored ones."""
        return self.kept.latents(self.dataset.classes[label], self.inventory[label]).flatten(1)

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Latents (B, C h w), and no logits (B, 0)."""
        codec = self.kept.codec
        size = codec.image_size
        pixels = torch.stack([from_pil(center_crop(image, size)) for image in images])
        # means have no random stream: no image needs a name
        inputs = to_unit(to_device(pixels, device_of(codec)))
        latents = codec.encode(inputs, [""] * len(images)).cpu()
        return latents.flatten(1), torch.empty(len(images), 0)

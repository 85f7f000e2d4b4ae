"""Diffusion transformers (Peebles & Xie 2023) on diffusers' DiTTransformer2DModel.

Weights in three forms, one forward pass: a hub id, a local diffusers folder, or one file with
facebookresearch/DiT's own key names (`.pt`, or `.safetensors` as `scripts/train_backbone.py`
writes it, whose metadata holds the constructor's arguments and the classes it was trained on).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from mgd3 import checks
from mgd3.backbones.codecs import make_codec, pick_device
from mgd3.backbones.dit_weights import as_trained, from_original
from mgd3.backbones.sources import (
    diffusers_source,
    find_file,
    load_pretrained,
    metadata_json,
    read_weights,
)
from mgd3.datasets import ClassInfo
from mgd3.schedule import linear_alphas_cumprod
from mgd3.types import Prediction, UserError


class BareDiT:
    """A transformer as samplers need it: without a codec and without names of its classes."""

    def __init__(self, network: DiTTransformer2DModel, device: torch.device) -> None:
        self.network = network
        self.device = device
        self.alphas_cumprod = linear_alphas_cumprod()  # DiT's schedule, (1000,) float64
        self.null_class = int(network.config.num_embeds_ada_norm)  # the row after the last class
        side = network.config.sample_size
        self.latent_shape = (network.config.in_channels, side, side)  # (C, h, w)

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """Noise and, where the network learned it, variance for x_t (B, C, h, w)."""
        out = self.network(x_t, timestep=t, class_labels=class_ids, return_dict=False)[0]
        channels = x_t.shape[1]
        variance = out[:, channels:] if out.shape[1] > channels else None
        return Prediction(eps=out[:, :channels], variance=variance)


class DiT:
    """A class-conditional diffusion transformer with its codec."""

    def __init__(
        self,
        weights: str,
        vae: str | None,
        image_size: int,
        num_heads: int = 16,
        device: str = "auto",
    ) -> None:
        """`vae` None means pixel space; `num_heads` is read from the file where it says so."""
        self.num_heads = checks.integer("backbone.num_heads", num_heads, minimum=1)
        self.device = pick_device(device)
        self.codec = make_codec(vae, image_size, self.device)
        self._path = find_file(str(weights))
        if self._path is None:
            self._source = diffusers_source("backbone.weights", weights)

    @cached_property
    def _loaded(self) -> tuple[DiTTransformer2DModel, list[str] | None]:
        """The network and the wnids of its label rows (None: ImageNet's 1000 indices)."""
        if self._path is None:
            network: Any = load_pretrained(
                "backbone.weights", self._source, subfolder="transformer"
            )
            as_trained(network)
            trained_on = None
        else:
            tensors, metadata = read_weights("backbone.weights", self._path)
            config: Any = metadata_json(metadata, "config") or {}
            network = from_original(tensors, config.get("num_heads", self.num_heads))
            trained_on = metadata_json(metadata, "classes")
        expected, got = self.codec.image_size // self.codec.downsampling, network.config.sample_size
        if got != expected:
            raise UserError(
                f"backbone.image_size={self.codec.image_size} gives {expected} x {expected} "
                f"latents, but backbone.weights={self._path or self._source} was trained on {got} "
                f"x {got}; set backbone.image_size={got * self.codec.downsampling}"
            )
        return network.to(self.device).eval().requires_grad_(False), trained_on  # type: ignore[return-value]

    @property
    def network(self) -> DiTTransformer2DModel:
        """The transformer, float32, in eval mode; loaded on first use."""
        return self._loaded[0]

    @cached_property
    def _bare(self) -> BareDiT:
        return BareDiT(self.network, self.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self._bare.latent_shape

    @property
    def alphas_cumprod(self) -> Tensor:
        """DiT's linear schedule, (1000,) float64."""
        return self._bare.alphas_cumprod

    @property
    def null_class(self) -> int:
        """The row after the last class."""
        return self._bare.null_class

    def class_ids(self, classes: Sequence[ClassInfo]) -> list[int]:
        """ImageNet indices, or the position among the classes that the weights were trained on."""
        trained_on = self._loaded[1]
        if trained_on is None:
            unknown = [
                c.wnid for c in classes if c.imagenet_id is None or c.imagenet_id >= self.null_class
            ]
            what = f"is conditioned on ImageNet's first {self.null_class} classes"
        else:
            unknown = [c.wnid for c in classes if c.wnid not in trained_on]
            what = f"was trained on {', '.join(trained_on)}"
        if unknown:
            raise UserError(
                f"backbone.weights={self._path or self._source} {what} and does not know the "
                f"class {unknown[0]!r} of this dataset; choose another backbone, or train one on "
                "your own images with scripts/train_backbone.py"
            )
        if trained_on is None:
            return [c.imagenet_id for c in classes if c.imagenet_id is not None]
        return [trained_on.index(c.wnid) for c in classes]

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """Noise and, where the network learned it, variance for x_t (B, C, h, w)."""
        return self._bare.predict(x_t, t, class_ids)

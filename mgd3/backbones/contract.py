"""What samplers and mode discovery need of a diffusion model and its codec."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mgd3.backbones.schedule import NoiseSchedule
from mgd3.data.class_lists import ClassInfo


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A backbone's output for noisy latents."""

    eps: Tensor  # (B, C, h, w) predicted noise
    variance: Tensor | None = None  # (B, C, h, w) in [-1, 1], between the two log-variance bounds

    def detached(self) -> Prediction:
        """The same values without the graph that made them."""
        variance = None if self.variance is None else self.variance.detach()
        return Prediction(eps=self.eps.detach(), variance=variance)


class Codec(Protocol):
    """Pixels to latents and back; heavy weights load on first use."""

    image_size: int  # pixels that the network works on
    output_size: int  # pixels of the files that are written
    samples_latents: bool  # whether an image's latent depends on its key

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along one side."""

    @property
    def id(self) -> str:
        """Identifies everything that latents depend on; part of the latent cache's key."""

    def encode(self, images: Tensor, keys: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) to latents (B, C, h, w); a key names its image's random stream."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the images' latents, (B, C, h, w); 0 without a spread."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W), not clamped."""


class DiffusionModel(Protocol):
    """What samplers ask: predictions in the space of latents, by rows of the conditioning table."""

    device: torch.device
    precision: str  # in which it computes; weights and predictions are float32

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The training noise, and which of its timesteps samplers visit."""

    @property
    def null_class(self) -> int:
        """The row that stands for «no class» in classifier-free guidance."""

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """Noise (and variance) of x_t (B, C, h, w) at training timesteps t (B,)."""


class Backbone(DiffusionModel, Protocol):
    """A diffusion model, its codec and its classes by name; heavy weights load on first use."""

    codec: Codec

    def class_ids(self, classes: Sequence[ClassInfo]) -> list[int]:
        """Rows of the conditioning table; raises `UserError` for a class it cannot have."""


class FeatureBackbone(Backbone, Protocol):
    """A backbone that also shows what its network makes of x_t half-way."""

    @property
    def feature_blocks(self) -> int:
        """How many blocks it shows: a transformer's all, of a U-Net the mid block alone."""

    def features(self, x_t: Tensor, t: Tensor, class_ids: Tensor, block: int) -> Tensor:
        """Block 1, 2 ...'s output for x_t (B, C, h, w) at training timesteps t (B,).

        (B, tokens, D) float32; only the layers up to that block run, with a graph to x_t where the
        caller has autograd on.
        """


def told_of(backbone: Backbone, class_ids: Sequence[int]) -> str:
    """Identifies what the network is told of these rows beside its weights, such as prompts.

    A row's number says it for a network that has the table itself. One of your own whose table
    changes without its weights has a method of this name.
    """
    own: Callable[[Sequence[int]], str] | None = getattr(backbone, "told_of", None)
    return json.dumps(list(class_ids)) if own is None else own(class_ids)


def compiles(backbone: Backbone) -> bool:
    """Does its first step take torch.compile's minute? One of your own need not say so."""
    return bool(getattr(getattr(backbone, "compute", None), "compile", False))

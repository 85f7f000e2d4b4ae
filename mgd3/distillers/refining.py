"""What is done to an image's latents after it is sampled and chosen, before it is decoded."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mgd3.backbones.contract import Backbone
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.terms import SamplingBatch


class Refine(Protocol):
    """Moves finished latents, each row for itself: no row may look at another.

    Its random numbers come from each image's own stream, after the sampler's.
    """

    def __call__(
        self, backbone: Backbone, latents: Tensor, batch: SamplingBatch, noise: ImageNoise
    ) -> Tensor:
        """Latents (B, C, h, w) to latents (B, C, h, w)."""


class NoRefinement:
    """Leaves them as they are."""

    def __call__(
        self, backbone: Backbone, latents: Tensor, batch: SamplingBatch, noise: ImageNoise
    ) -> Tensor:
        """The latents."""
        return latents

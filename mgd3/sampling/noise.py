"""Sampling noise: one stream per image, whatever the batch, order or device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgd3.runtime.seeding import stream


class ImageNoise:
    """The noise of a batch: row b draws from the stream of (seed, wnid, index) alone.

    What is not the sampler's has a `purpose`, and streams of its own by it: a term that draws
    random numbers changes no sampling noise.
    """

    def __init__(
        self,
        seed: int,
        images: Sequence[tuple[str, int]],
        shape: tuple[int, int, int],
        purpose: str = "",
    ) -> None:
        own = [purpose] if purpose else []
        self.generators = [stream(seed, wnid, index, *own) for wnid, index in images]
        self._shape = shape

    def initial(self) -> Tensor:
        """x_T, (B, C, h, w): each stream's first draw."""
        return self._draw()

    def step(self) -> Tensor:
        """z of the next reverse step, (B, C, h, w)."""
        return self._draw()

    def _draw(self) -> Tensor:
        return torch.stack([torch.randn(self._shape, generator=g) for g in self.generators])

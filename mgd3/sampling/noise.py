"""Sampling noise: one stream per image, whatever the batch, order or device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgd3.runtime.seeding import stream

_AHEAD = 7  # steps drawn and copied at a time: the 49 draws of 50 steps are seven copies


class ImageNoise:
    """The noise of a batch: row b draws from the stream of (seed, wnid, index) alone.

    Streams are the CPU's. Several steps are drawn ahead and copied at once, into the device's queue
    where memory is pinned for it: no step waits for its noise. What is not the sampler's has a
    `purpose`, and streams of its own by it: a term that draws numbers changes no sampling noise.
    """

    def __init__(
        self,
        seed: int,
        images: Sequence[tuple[str, int]],
        shape: tuple[int, int, int],
        device: torch.device | None = None,
        steps: int = 1,
        purpose: str = "",
    ) -> None:
        """`shape` is a latent's, (C, h, w); `device` None is the CPU.

        `steps` are expected to draw: no more is drawn ahead.
        """
        own = [purpose] if purpose else []
        self.generators = [stream(seed, wnid, index, *own) for wnid, index in images]
        self._shape, self._device = shape, device or torch.device("cpu")
        self._expected = steps
        self._drawn: list[Tensor] = []  # of the next steps, the nearest last

    def initial(self) -> Tensor:
        """x_T, (B, C, h, w): each stream's first draw."""
        return self._draw(1)[0]

    def step(self) -> Tensor:
        """z of the next reverse step, (B, C, h, w)."""
        if not self._drawn:
            ahead = max(1, min(_AHEAD, self._expected))
            self._expected -= ahead
            self._drawn = list(self._draw(ahead).unbind())[::-1]
        return self._drawn.pop()

    def _draw(self, steps: int) -> Tensor:
        """The next draws of every stream, (steps, B, C, h, w)."""
        pinned = self._device.type == "cuda"
        drawn = torch.empty(steps, len(self.generators), *self._shape, pin_memory=pinned)
        for step in drawn:
            for row, generator in zip(step, self.generators, strict=True):
                torch.randn(self._shape, generator=generator, out=row)
        return drawn.to(self._device, non_blocking=True)

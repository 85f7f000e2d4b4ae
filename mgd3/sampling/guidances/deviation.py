"""IGD's deviation term (Chen et al., ICLR 2025): away from the class's earlier images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgd3.runtime import checks
from mgd3.sampling.guidances.window import Window
from mgd3.sampling.terms import DenoiseState, GuidanceTerm, SamplingBatch

_FLOOR = 1e-12
_PUBLISHED_PUSH = 120 / (4 * 32 * 32)  # of an element of x_t, in the latents of 256 px


class DeviationGuidance:
    """Lowers the cosine of each sample to the most similar finished latents of its class.

    In steps low..high x_{t-1} moves by -gamma d cos(x_t, m)/d x_t, where m is the nearest to the
    noisy x_t, by cosine, of the class's last `memory` images. The shift is absolute: no sigma_t.
    Its norm is at most gamma / |x_t|, so for x_t of unit variance an element's RMS is at most
    gamma / D: one gamma is another push in latents of another size.
    The first image of a class has nothing to leave, and is that of a run without this term.
    """

    needs_modes, needs_finished = False, True

    def __init__(self, gamma: float, low: int, high: int, memory: int) -> None:
        self.gamma = checks.number("guidance (deviation): gamma", gamma, minimum=0)
        self.window = Window("guidance (deviation)", low, high)
        self.memory = checks.integer("guidance (deviation): memory", memory, minimum=1)

    def check(self, num_steps: int) -> None:
        """The window must lie among the sampling steps."""
        self.window.check(num_steps)

    def advice(self, num_steps: int, elements: int) -> list[str]:
        """That the push is far stronger than published, if it is: latents are smaller here."""
        usual = _PUBLISHED_PUSH * elements
        if self.gamma <= 2 * usual or num_steps <= self.window.low:
            return []
        return [
            f"guidance (deviation): gamma={self.gamma:g} moves an element of a latent by up to "
            f"{self.gamma / elements:.2g} a step, {self.gamma / usual:.0f} times as far as "
            f"published at 256 px; gamma={usual:g} is the published push in latents of this size"
        ]

    def bind(self, batch: SamplingBatch) -> GuidanceTerm:
        """The term of one batch, which keeps each row's memory."""
        assert batch.finished is not None, "the distiller gives finished latents"
        memories = [batch.finished(row)[-self.memory :] for row in range(len(batch.images))]

        def term(state: DenoiseState) -> Tensor:
            if state.step not in self.window or not self.gamma:
                return torch.zeros_like(state.x0_hat)
            return state.from_shift(-self.gamma * cosine_gradient(state.x_t.detach(), memories))

        return term


def cosine_gradient(x: Tensor, memories: Sequence[Tensor]) -> Tensor:
    """d cos(x, m)/d x of each row's nearest m, (B, C, h, w): (m/|m| - cos x/|x|) / |x|.

    x is (B, C, h, w), each row's memory (n, C, h, w); zero where a memory is empty.
    """
    rows = [
        _row_gradient(row.flatten(), memory.flatten(1).to(row)).view_as(row)
        if len(memory)
        else torch.zeros_like(row)
        for row, memory in zip(x, memories, strict=True)
    ]
    return torch.stack(rows)


def _row_gradient(x: Tensor, memory: Tensor) -> Tensor:
    """Of x (D,) to the nearest of a memory (n, D)."""
    norm = x.norm().clamp(min=_FLOOR)
    unit, ways = x / norm, memory / memory.norm(dim=1, keepdim=True).clamp(min=_FLOOR)
    cosines = ways @ unit  # (n,)
    nearest = cosines.argmax()
    return (ways[nearest] - cosines[nearest] * unit) / norm

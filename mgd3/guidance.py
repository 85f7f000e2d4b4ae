"""Guidance terms g_t of a reverse step. Where g_t enters is the sampler's business."""

from __future__ import annotations

import torch
from torch import Tensor

from mgd3 import checks
from mgd3.types import DenoiseState


class ModeGuidance:
    """Pulls each sample to its mode: g_t = scale (m - x0_hat) while step > stop_t, then lets go.

    Paper eq. 5 and «stop guidance». The inequality is strict, as in the released code: with 50
    steps and stop_t 25, steps 49..26 are guided, 24 in all; the last step never is.
    """

    needs_modes = True

    def __init__(self, scale: float, stop_t: int) -> None:
        self.scale = checks.number("guidance.scale", scale, minimum=0)
        self.stop_t = checks.integer("guidance.stop_t", stop_t, minimum=0)

    def check(self, num_steps: int) -> None:
        """stop_t counts sampling steps: `num_steps` means no guidance, 0 all but the last step."""
        checks.integer("guidance.stop_t", self.stop_t, minimum=0, maximum=num_steps)

    def __call__(self, state: DenoiseState, modes: Tensor) -> Tensor:
        """g_t, (B, C, h, w)."""
        if state.step <= self.stop_t:
            return torch.zeros_like(state.x0_hat)
        return self.scale * (modes - state.x0_hat)


class NoGuidance:
    """g_t = 0: the backbone's plain samples."""

    needs_modes = False

    def check(self, num_steps: int) -> None:
        """Nothing to check."""

    def __call__(self, state: DenoiseState, modes: Tensor) -> Tensor:
        """Zeros, (B, C, h, w)."""
        return torch.zeros_like(state.x0_hat)

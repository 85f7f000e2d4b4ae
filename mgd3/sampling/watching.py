"""Callbacks for `on_step`: looking at samples on their way."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from mgd3.sampling.terms import DenoiseState


class StepWatch:
    """Keeps what the network restores of a batch at some sampling steps."""

    def __init__(self, steps: Collection[int]) -> None:
        self.steps = frozenset(steps)
        self.seen: dict[int, Tensor] = {}  # x0_hat (B, C, h, w) by step, in the order of sampling

    def __call__(self, state: DenoiseState) -> None:
        """One step, before it is taken."""
        if state.step in self.steps:
            self.seen[state.step] = state.x0_hat.clone()


def spread_steps(num_steps: int, count: int) -> list[int]:
    """About `count` of `num_steps` sampling steps, evenly from the first, and the last (0)."""
    every = max(1, num_steps // count)
    return list(dict.fromkeys([*range(num_steps - 1, -1, -every), 0]))

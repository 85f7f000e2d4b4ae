"""Callbacks for `on_step`: looking at samples on their way, and counting steps."""

from __future__ import annotations

from collections.abc import Callable, Collection

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


class BatchBar:
    """Advances a bar with a batch's steps, which can be taken back; a user's callback sees them."""

    def __init__(
        self,
        advance: Callable[..., None],
        images: int,
        on_step: Callable[[DenoiseState], None] | None,
    ) -> None:
        self._advance, self._images, self._on_step = advance, images, on_step
        self._steps = 0

    def __call__(self, state: DenoiseState) -> None:
        """One more step."""
        if self._on_step is not None:
            self._on_step(state)
        self._steps += 1
        self._advance(self._images)

    def take_back(self) -> None:
        """The batch comes again, smaller."""
        self._advance(-self._steps * self._images)


def spread_steps(num_steps: int, count: int) -> list[int]:
    """About `count` of `num_steps` sampling steps, evenly from the first, and the last (0)."""
    every = max(1, num_steps // count)
    return list(dict.fromkeys([*range(num_steps - 1, -1, -every), 0]))

"""Which of the sampling steps a term acts in."""

from __future__ import annotations

from dataclasses import dataclass

from mgd3.runtime import checks


@dataclass(frozen=True)
class Window:
    """Steps low to high, both included; steps count down to 0."""

    key: str  # of the configuration, for messages
    low: int
    high: int

    def __post_init__(self) -> None:
        checks.integer(f"{self.key}: low", self.low, minimum=0)
        checks.integer(f"{self.key}: high", self.high, minimum=self.low)

    def check(self, num_steps: int) -> None:
        """`UserError` for a step that a run of `num_steps` does not take."""
        checks.integer(f"{self.key}: high", self.high, maximum=num_steps - 1)

    def __contains__(self, step: int) -> bool:
        return self.low <= step <= self.high

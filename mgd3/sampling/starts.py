"""Where the reverse process begins."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mgd3.backbones.schedule import SamplingSchedule
from mgd3.runtime import checks
from mgd3.sampling.terms import SamplingBatch


class Start(Protocol):
    """Where the reverse process begins.

    It may have `fit`, called once before any image (`terms.fit_part`).
    """

    needs_modes: bool

    def steps(self, num_steps: int) -> int:
        """How many of `num_steps` sampling steps are taken."""

    def initial(self, schedule: SamplingSchedule, batch: SamplingBatch, noise: Tensor) -> Tensor:
        """x at the first of them, (B, C, h, w)."""


class NoiseStart:
    """At the last step, from pure noise."""

    needs_modes = False

    def steps(self, num_steps: int) -> int:
        """How many of `num_steps` steps are taken."""
        return num_steps

    def initial(self, schedule: SamplingSchedule, batch: SamplingBatch, noise: Tensor) -> Tensor:
        """The noise itself, (B, C, h, w)."""
        return noise


class PrototypeStart:
    """From each image's mode, noised to `strength` of the way (D4M's synthesis, after SDEdit).

    With 50 steps and strength 0.7 the first step is 34: x = sqrt(abar_34) m + sqrt(1 - abar_34) z,
    and 35 steps follow, as diffusers' image-to-image pipelines count them.
    """

    needs_modes = True

    def __init__(self, strength: float) -> None:
        self.strength = checks.number("start.strength", strength, minimum=0, maximum=1)

    def steps(self, num_steps: int) -> int:
        """How many of `num_steps` steps are taken, at least one."""
        return max(1, int(num_steps * self.strength))

    def initial(self, schedule: SamplingSchedule, batch: SamplingBatch, noise: Tensor) -> Tensor:
        """The noised modes, (B, C, h, w)."""
        abar = schedule.abar[self.steps(len(schedule.timesteps)) - 1].item()
        return abar**0.5 * batch.modes + (1 - abar) ** 0.5 * noise

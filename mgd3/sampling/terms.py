"""What a guidance term is given: once per batch, and at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mgd3.modes.finders import Modes


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one image is steered to."""

    modes: Modes  # its class's
    index: int  # its own among them
    latents: Callable[[], Tensor]  # reads the class's real latents, (N, C, h, w)


@dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """Images that are sampled together; rows belong to any classes."""

    class_ids: Tensor  # (B,) rows of the backbone's conditioning table
    modes: Tensor  # (B, C, h, w) each row's own mode; zeros where nothing needs one
    targets: Sequence[Target] = ()  # where the modes come from; empty without mode discovery
    images: Sequence[tuple[str, int]] = ()  # (wnid, noise stream) of each row


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """One reverse step as guidance terms and callbacks see it: no CFG twin."""

    step: int  # sampling step, num_steps-1 down to 0
    num_steps: int
    x_t: Tensor  # (B, C, h, w)
    x0_hat: Tensor  # (B, C, h, w)
    images: Sequence[tuple[str, int]] = ()  # (wnid, noise stream) of each row


class GuidanceTerm(Protocol):
    """One batch's guidance, which a sampler asks at every step."""

    def __call__(self, state: DenoiseState) -> Tensor:
        """g_t, (B, C, h, w)."""


class Guidance(Protocol):
    """A term added to every reverse step (paper section 4.2)."""

    needs_modes: bool

    def check(self, num_steps: int) -> None:
        """Raise `UserError` if the settings make no sense for this many sampling steps."""

    def bind(self, batch: SamplingBatch) -> GuidanceTerm:
        """The term of one batch."""

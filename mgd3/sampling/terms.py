"""What a guidance is given: the real set once, a batch at a time, and every step.

A term says how far into the network it looks (`Reach`). The sampler alone switches autograd on: it
makes x_t a leaf and runs the network with a graph where that is asked for, so that a term does
nothing but build a number per row and ask for its `gradient` in x_t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.modes.finders import Modes


class Reach(IntEnum):
    """What of a step a term differentiates, in x_t."""

    NONE = 0  # nothing: the values of x_t and x0_hat are enough
    CLEAN = 1  # x0_hat with eps held constant
    DENOISER = 2  # eps too, through both rows of classifier-free guidance


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
    labels: Sequence[int] = ()  # each row's class by its position in the dataset: a student's label
    seed: int = 0  # of the set
    # The latents (n, C, h, w) of the row's class that were finished before it, in their order:
    # those of smaller index alone, so that an image depends on no other row of its batch
    finished: Callable[[int], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """One reverse step as guidance terms and callbacks see it."""

    step: int  # sampling step, num_steps-1 down to 0
    num_steps: int
    x_t: Tensor  # (B, C, h, w); a leaf where the term differentiates
    x0_hat: Tensor  # (B, C, h, w); attached to x_t as far as the term's reach goes
    x0_twin: Tensor | None = None  # the same of each row's twin, where the term asks for it
    images: Sequence[tuple[str, int]] = ()  # (wnid, noise stream) of each row
    eps: Tensor | None = None  # (B, C, h, w) the guided prediction of the noise
    t: int = 0  # training timestep
    abar: float = 1.0
    gain: Tensor | float = 1.0  # what the sampler multiplies g_t by: g_t moves x_{t-1} by gain g_t
    eps_gain: float = 1.0  # what a change of eps moves x_{t-1} by, per unit

    def from_shift(self, shift: Tensor) -> Tensor:
        """The g_t that moves x_{t-1} by `shift` (B, C, h, w), whatever the sampler."""
        return shift / self.gain

    def from_eps(self, change: Tensor) -> Tensor:
        """The g_t that does what adding `change` (B, C, h, w) to eps would."""
        return change * self.eps_gain / self.gain


def gradient(state: DenoiseState, per_row: Callable[[], Tensor]) -> Tensor:
    """d(per_row)/d(x_t), (B, C, h, w): each row's own, because `per_row` () gives (B,) numbers.

    Numbers are summed, never averaged: a row's gradient does not know how many others there are.
    """
    with torch.enable_grad():
        # kept for the other terms of a sum; the sampler lets go of it before the next step
        (found,) = torch.autograd.grad(per_row().sum(), state.x_t, retain_graph=True)
    return found


class GuidanceTerm(Protocol):
    """One batch's guidance, which a sampler asks at every step.

    It may have `reach(step) -> Reach`; without, it differentiates nothing. Where its `twin` is true
    the state has an `x0_twin`, the other row of the pair that DiT's released sampler walks. A term
    that holds others hands on both.
    """

    def __call__(self, state: DenoiseState) -> Tensor:
        """g_t, (B, C, h, w)."""


class Guidance(Protocol):
    """A term added to every reverse step (paper section 4.2).

    What it may have beside this: `fit`, called once before any image (`fit_part`), and `stages`,
    what that would do, for a plan, both of the same arguments; `needs_finished`, true where its
    term reads the finished latents of a row's class, and `block`, how many images of a class then
    are made at a time; `reach`, the largest of its terms; `advice`, what a user should be told of
    settings that are allowed and seldom meant (`advice_of`).
    """

    @property
    def needs_modes(self) -> bool:
        """Whether each image must have a mode."""

    def check(self, num_steps: int) -> None:
        """Raise `UserError` if the settings make no sense for this many sampling steps."""

    def bind(self, batch: SamplingBatch) -> GuidanceTerm:
        """The term of one batch; called for every guidance, with or without modes."""


def advice_of(part: object, num_steps: int, elements: int) -> list[str]:
    """What a user should know of a guidance's settings, with latents of so many elements each."""
    advice = getattr(part, "advice", None)
    return advice(num_steps, elements) if advice is not None else []


def reach_of(part: object, step: int | None = None) -> Reach:
    """How far a term differentiates at a step, or a guidance at most (`step` None)."""
    own = getattr(part, "reach", Reach.NONE)
    return own if step is None or isinstance(own, Reach) else own(step)


def has_twin(part: object) -> bool:
    """Does a term look at twins?"""
    return bool(getattr(part, "twin", False))


def needs_finished(guidance: object) -> bool:
    """Does it read the finished latents of a class?"""
    return bool(getattr(guidance, "needs_finished", False))


def fit_part(
    part: object,
    dataset: RealDataset,
    inventory: Callable[[], Sequence[ClassImages]],
    *others: object,
) -> None:
    """Let a part learn from the real training images, if it has a `fit`.

    `others` are what its `fit` takes beside them: of a guidance and a start, backbone and work.
    """
    fit = getattr(part, "fit", None)
    if fit is not None:
        fit(dataset, inventory(), *others)

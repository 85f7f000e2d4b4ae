"""IGD's influence term (Chen et al., ICLR 2025): towards what a student would learn from.

An image is good if a student's gradient on it points where the gradient on its class's real images
does, at several moments of the student's training. The moments are a surrogate's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone, Codec
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.runtime import checks
from mgd3.runtime.compute import Work, matmul_precision
from mgd3.runtime.errors import UserError
from mgd3.runtime.stages import Stage
from mgd3.sampling.guidances.window import Window
from mgd3.sampling.terms import DenoiseState, Reach, SamplingBatch, gradient

_RELEASED_FLOOR = 1e-6  # added to the product of norms in the released cosine
_FLOOR = 1e-12


class Snapshot(Protocol):
    """A student at one moment of its training."""

    def gradient(self, images: Tensor, label: int) -> Tensor:
        """Of the mean cross-entropy of images (B, 3, H, W) in [-1, 1] in all parameters, (P,).

        It has a graph to images that require a gradient.
        """


class Trajectory(Protocol):
    """A student on its way through the full real set."""

    @property
    def snapshots(self) -> Sequence[Snapshot]:
        """In the order of the training."""

    def real(self, label: int) -> Tensor:
        """By snapshot the mean gradient of a class's real images, (E, P)."""


class Surrogate(Protocol):
    """Whose gradients are compared."""

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> Trajectory:
        """The trajectory on these classes, trained now unless the cache has it."""

    def stages(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> list[Stage]:
        """What `fit` would do."""


class InfluenceGuidance:
    """Turns a student's gradient on each decoded x0_hat to that on its class's real images.

    In steps low..high x_{t-1} moves by -k rho g / rms(g) rms(eps) sqrt(1 - abar), where g is the
    gradient in x_t of 1 - cosine, averaged over the snapshots. So the shift's size depends on k and
    rho alone; it is absolute: no sigma_t. With `twin` the gradient on an image is also that on its
    twin, as the released code decodes both rows of its pair.
    """

    needs_modes = False
    reach = Reach.DENOISER

    def __init__(
        self,
        k: float,
        rho: float,
        low: int,
        high: int,
        surrogate: Surrogate | None = None,
        twin: bool = False,
    ) -> None:
        self.k = checks.number("guidance (influence): k", k, minimum=0)
        self.rho = checks.number("guidance (influence): rho", rho, minimum=0)
        self.window = Window("guidance (influence)", low, high)
        self.twin = checks.flag("guidance (influence): twin", twin)
        self.surrogate = surrogate
        self._fitted: tuple[Trajectory, Backbone] | None = None
        self._real: dict[int, Tensor] = {}  # of the last batch's classes, where they are used

    def check(self, num_steps: int) -> None:
        """The window must lie among the sampling steps, and there must be a surrogate."""
        self.window.check(num_steps)
        if self.surrogate is None:
            raise UserError(
                "guidance: influence compares the gradients of a student on its way; add "
                "surrogate=trajectory"
            )

    def fit(
        self,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        backbone: Backbone,
        work: Work,
    ) -> None:
        """Train the surrogate and take its real gradients, unless the cache has them."""
        assert self.surrogate is not None, "check first"
        self._fitted, self._real = (self.surrogate.fit(dataset, inventory), backbone), {}

    def stages(
        self,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        backbone: Backbone,
        work: Work,
    ) -> list[Stage]:
        """The surrogate's."""
        return [] if self.surrogate is None else self.surrogate.stages(dataset, inventory)

    def bind(self, batch: SamplingBatch) -> InfluenceTerm:
        """The term of one batch, which holds the real gradients of its classes."""
        assert self._fitted is not None, "fit first"
        trajectory, backbone = self._fitted
        labels = sorted(set(batch.labels))
        # the next batch mostly has the same classes; others leave before new ones come
        self._real = {label: self._real[label] for label in labels if label in self._real}
        for label in labels:
            if label not in self._real:
                self._real[label] = trajectory.real(label).to(backbone.device)
        return InfluenceTerm(
            self, trajectory.snapshots, backbone.codec, batch.labels, dict(self._real)
        )


@dataclass(frozen=True)
class InfluenceTerm:
    """One batch's."""

    options: InfluenceGuidance
    snapshots: Sequence[Snapshot]
    codec: Codec
    labels: Sequence[int]  # by row
    real: Mapping[int, Tensor]  # by label, (E, P)

    def reach(self, step: int) -> Reach:
        """Through the denoiser inside the window."""
        return Reach.DENOISER if self._acts(step) else Reach.NONE

    def __call__(self, state: DenoiseState) -> Tensor:
        """g_t, (B, C, h, w)."""
        if not self._acts(state.step):
            return torch.zeros_like(state.x0_hat)
        assert state.eps is not None
        shown = [state.x0_hat]
        if self.twin:
            assert state.x0_twin is not None, "a term that holds this one hands on its `twin`"
            shown.append(state.x0_twin)
        with torch.enable_grad():
            clean = torch.stack(shown, dim=1)  # (B, 1 or 2, C, h, w)
        # Row by row to the latents, while the denoiser's graph waits; it is walked once for all
        rows = zip(clean.detach(), self.labels, strict=True)
        pulls = torch.stack([self._pull(x, label) for x, label in rows])
        found = gradient(state, lambda: (clean * pulls).flatten(1).sum(dim=1))
        size = self.options.k * self.options.rho
        return state.from_shift(-size * normalised(found, state.eps, state.abar))

    @property
    def twin(self) -> bool:
        """Are twins looked at? Not by a term that never acts."""
        return self.options.twin and self.options.k * self.options.rho > 0

    def _acts(self, step: int) -> bool:
        return step in self.options.window and self.options.k * self.options.rho > 0

    def _pull(self, latents: Tensor, label: int) -> Tensor:
        """d loss/d latents of one row's clean images (n, C, h, w), to a student one batch."""
        with torch.enable_grad(), matmul_precision("highest"):
            latents = latents.detach().requires_grad_()
            image = self.codec.decode(latents)  # (n, 3, H, W)
            seen = image.detach().requires_grad_()
            pull = torch.zeros_like(seen)
            for snapshot, real in zip(self.snapshots, self.real[label], strict=True):
                loss = misalignment(snapshot.gradient(seen, label), real) / len(self.snapshots)
                pull += torch.autograd.grad(loss, seen)[0]
            (found,) = torch.autograd.grad(image, latents, pull)
        return found


def misalignment(own: Tensor, real: Tensor) -> Tensor:
    """1 - cosine of two gradients (P,), in [0, 2]; the floor is the released code's."""
    real = real.to(own)
    return 1 - own @ real / (own.norm() * real.norm() + _RELEASED_FLOOR)


def normalised(found: Tensor, eps: Tensor, abar: float) -> Tensor:
    """Each row's direction (B, C, h, w) at the size rms(eps) sqrt(1 - abar)."""
    size = _rms(eps) * (1 - abar) ** 0.5
    return found * (size / _rms(found).clamp(min=_FLOOR))


def _rms(rows: Tensor) -> Tensor:
    """(B, 1, 1, 1)."""
    return rows.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()

"""Guidance terms g_t of a reverse step. Where g_t enters is the sampler's business."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mgd3.runtime import checks
from mgd3.runtime.compute import to_device
from mgd3.sampling.terms import DenoiseState, GuidanceTerm, SamplingBatch


@dataclass(frozen=True)
class ModeTerm:
    """g_t = lambda (m - x0_hat) while step > t_stop, then 0 (eq. 5 and «stop guidance»)."""

    modes: Tensor  # m: each row's own mode, (B, C, h, w)
    scale: float  # lambda
    stop_t: int  # t_stop, in sampling steps

    def __call__(self, state: DenoiseState) -> Tensor:
        """g_t, (B, C, h, w)."""
        if state.step <= self.stop_t:
            return torch.zeros_like(state.x0_hat)
        return self.scale * (self.modes - state.x0_hat)


class ModeGuidance:
    """Pulls each sample to its mode, then lets go (MGD3).

    The inequality is strict, as in the released code: with 50 steps and stop_t 25, steps 49..26
    are guided, 24 in all; the last step never is.
    """

    needs_modes = True

    def __init__(self, scale: float, stop_t: int) -> None:
        self.scale = checks.number("guidance.scale", scale, minimum=0)
        self.stop_t = checks.integer("guidance.stop_t", stop_t, minimum=0)

    def check(self, num_steps: int) -> None:
        """stop_t counts sampling steps: `num_steps` means no guidance, 0 all but the last step."""
        checks.integer("guidance.stop_t", self.stop_t, minimum=0, maximum=num_steps)

    def guided_steps(self, num_steps: int) -> int:
        """How many of the last `num_steps` sampling steps g_t moves."""
        return max(0, num_steps - 1 - self.stop_t) if self.scale else 0

    def advice(self, num_steps: int, elements: int) -> list[str]:
        """That no step is guided, if none is."""
        if self.guided_steps(num_steps):
            return []
        return [
            f"mode guidance of scale={self.scale:g} and stop_t={self.stop_t} guides none of the "
            f"{num_steps} steps ({num_steps - 1} to 0; those above stop_t are guided): images are "
            "those without it"
        ]

    def bind(self, batch: SamplingBatch) -> GuidanceTerm:
        """The term of one batch."""
        return ModeTerm(batch.modes, self.scale, self.stop_t)


class NoGuidance:
    """g_t = 0: the backbone's plain samples."""

    needs_modes: ClassVar[bool] = False

    def check(self, num_steps: int) -> None:
        """Nothing to check."""

    def bind(self, batch: SamplingBatch) -> GuidanceTerm:
        """Zeros, (B, C, h, w)."""
        return lambda state: torch.zeros_like(state.x0_hat)


class TangentModeGuidance(ModeGuidance):
    """Mode guidance along the class's own directions (after ManifoldGD).

    Of each pull it keeps what lies along the `tangent_dim` leading principal directions of the
    `tangent_neighbors` real latents nearest to the mode. ManifoldGD takes them from noised latents;
    isotropic noise leaves the directions as they are.
    """

    def __init__(
        self, scale: float, stop_t: int, tangent_dim: int, tangent_neighbors: int = 20
    ) -> None:
        super().__init__(scale, stop_t)
        self.tangent_dim = checks.integer("guidance.tangent_dim", tangent_dim, minimum=1)
        self.tangent_neighbors = checks.integer(
            "guidance.tangent_neighbors", tangent_neighbors, minimum=self.tangent_dim + 1
        )

    def bind(self, batch: SamplingBatch) -> GuidanceTerm:
        """The projected term of one batch."""
        pull, basis = super().bind(batch), to_device(self._basis(batch), batch.modes.device)

        def projected(state: DenoiseState) -> Tensor:
            g_t = pull(state)
            along = torch.einsum("bdn,bn->bd", basis, g_t.flatten(1))
            return torch.einsum("bdn,bd->bn", basis, along).view_as(g_t)

        return projected

    def _basis(self, batch: SamplingBatch) -> Tensor:
        """Orthonormal directions at each row's mode, (B, d, C h w)."""
        latents: dict[Callable[[], Tensor], Tensor] = {}
        for target in batch.targets:
            if target.latents not in latents:
                latents[target.latents] = target.latents().flatten(1)
        return torch.stack(
            [
                tangent_basis(
                    latents[target.latents],
                    target.modes.centers[target.index].flatten(),
                    self.tangent_dim,
                    self.tangent_neighbors,
                )
                for target in batch.targets
            ]
        )


def tangent_basis(points: Tensor, at: Tensor, dim: int, neighbors: int) -> Tensor:
    """The leading principal directions of the points (N, n) nearest to `at` (n,): (dim, n)."""
    return principal_directions(nearest_points(points, at, neighbors), dim)


def nearest_points(points: Tensor, at: Tensor, count: int) -> Tensor:
    """Of points (N, n) those nearest to `at` (n,), ties in their order: (count, n)."""
    return points[torch.cdist(at[None], points)[0].argsort(stable=True)[:count]]


def principal_directions(patch: Tensor, dim: int) -> Tensor:
    """The leading principal directions of points (N, n): (dim, n).

    Directions along which these points do not vary are zero.
    """
    _, sizes, directions = torch.linalg.svd(patch - patch.mean(dim=0), full_matrices=False)
    basis = torch.zeros(dim, patch.shape[1]).to(patch)
    kept = int((sizes[:dim] > 1e-6 * sizes[:1].clamp(min=1e-12)).sum())
    basis[:kept] = directions[:kept]
    return basis

"""ManifoldGD's guidance as released (CVPR 2026): MGD3's pull and a push of fixed length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream
from mgd3.sampling.guidance import ModeGuidance, nearest_points, principal_directions
from mgd3.sampling.terms import DenoiseState, GuidanceTerm, SamplingBatch


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Made-up points around a mode that stand for the class's manifold.

    Half of their distances lie on a line from `line_from` to the radius, the others are uniform
    below it. The radius starts at `widest` times its own and shrinks to it over the first `warm`
    guided steps.
    """

    points: int  # even
    radius: float
    line_from: float
    widest: float
    warm: int

    def radius_at(self, guided: int) -> float:
        """After so many guided steps."""
        left = max(0.0, 1 - guided / self.warm) if self.warm else 0.0
        share = (math.exp(left) - 1) / (math.e - 1)
        return self.radius * (1 + (self.widest - 1) * share)

    def around(self, mode: Tensor, guided: int, draw: Generator) -> Tensor:
        """Points (points, n) around a mode (n,)."""
        radius, half = self.radius_at(guided), self.points // 2
        ways = torch.randn(self.points, len(mode), generator=draw)
        ways /= ways.norm(dim=1, keepdim=True).clamp(min=1e-12)
        line = torch.linspace(self.line_from, radius, half)
        sizes = torch.cat([line, radius * torch.rand(half, generator=draw)])
        return mode + sizes[:, None] * ways


class ManifoldGuidance(ModeGuidance):
    """The released ManifoldGD: mode guidance, not projected, plus a shift v of the mean.

    v = -push tanh(d / bandwidth) u, where u is the unit vector of what the tangents leave of
    x_t - mu; mu, the tangents and the least distance d come from the `neighbors` points nearest to
    x_t of a cloud around the mode that is noised as x_t is. Latents lie some 90 apart, so the tanh
    is 1 and |v| = `push` at every guided step.

    The released code takes 4096 x 4096 eigenvectors, of which the few points span all that count;
    it draws the clouds from a global generator, here each image and step has its own stream.
    """

    def __init__(
        self,
        scale: float,
        stop_t: int,
        push: float = 0.1,
        bandwidth: float = 0.2,
        tangent_dim: int = 3,
        neighbors: int = 12,
        points: int = 300,
        radius: float = 0.05,
        line_from: float = 0.1,
        widest: float = 2.0,
        warm: int = 5,
    ) -> None:
        """Raises `UserError` for an odd number of points."""
        super().__init__(scale, stop_t)
        self.push = checks.number("guidance.push", push, minimum=0)
        self.bandwidth = checks.number("guidance.bandwidth", bandwidth, minimum=1e-9)
        self.tangent_dim = checks.integer("guidance.tangent_dim", tangent_dim, minimum=1)
        fewest = self.tangent_dim + 1
        self.neighbors = checks.integer("guidance.neighbors", neighbors, minimum=fewest)
        checks.integer("guidance.points", points, minimum=self.neighbors)
        if points % 2:
            raise UserError(f"guidance.points={points} is odd; half of them lie on a line of radii")
        self.cloud = Cloud(
            points=points,
            radius=checks.number("guidance.radius", radius, minimum=0),
            line_from=checks.number("guidance.line_from", line_from, minimum=0),
            widest=checks.number("guidance.widest", widest, minimum=1),
            warm=checks.integer("guidance.warm", warm, minimum=0),
        )

    def guided_steps(self, num_steps: int) -> int:
        """How many of the last `num_steps` sampling steps pull or push moves."""
        return max(0, num_steps - 1 - self.stop_t) if self.scale or self.push else 0

    def bind(self, batch: SamplingBatch) -> GuidanceTerm:
        """Pull and push of one batch."""
        pull = super().bind(batch)

        def term(state: DenoiseState) -> Tensor:
            g_t = pull(state)
            if state.step <= self.stop_t:
                return g_t
            return g_t + state.from_shift(self._shift(batch, state))

        return term

    def _shift(self, batch: SamplingBatch, state: DenoiseState) -> Tensor:
        """v, (B, C, h, w); every row from its own stream."""
        rows = []
        for (wnid, k), mode, x_t in zip(batch.images, batch.modes, state.x_t, strict=True):
            draw = stream(batch.seed, wnid, k, "manifold", state.step)
            rows.append(self._row(mode.flatten().cpu(), x_t.flatten(), state, draw).view_as(x_t))
        return torch.stack(rows)

    def _row(self, mode: Tensor, x_t: Tensor, state: DenoiseState, draw: Generator) -> Tensor:
        """v of one row, (n,), for x_t (n,)."""
        points = self.cloud.around(mode, state.num_steps - 1 - state.step, draw)
        noise = torch.randn(points.shape, generator=draw)
        noisy = (state.abar**0.5 * points + (1 - state.abar) ** 0.5 * noise).to(x_t)
        patch = nearest_points(noisy, x_t, self.neighbors)
        tangents = principal_directions(patch, self.tangent_dim)  # (d, n)
        away = x_t - patch.mean(dim=0)
        normal = away - tangents.T @ (tangents @ away)
        least = (patch - x_t).norm(dim=1).min()
        size = self.push * torch.tanh(least / self.bandwidth)
        return -size * normal / normal.norm().clamp(min=1e-12)

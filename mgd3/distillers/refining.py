"""What is done to an image's latents after it is sampled and chosen, before it is decoded."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone
from mgd3.backbones.schedule import SamplingSchedule
from mgd3.runtime import checks
from mgd3.runtime.batching import Batches
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.terms import Reach, SamplingBatch

_ROWS = 8  # at once: each row's graph of a large denoiser takes half a GiB


class Refine(Protocol):
    """Moves finished latents, each row for itself: no row may look at another.

    Its random numbers come from each image's own stream, after the sampler's.
    """

    def __call__(
        self, backbone: Backbone, latents: Tensor, batch: SamplingBatch, noise: ImageNoise
    ) -> Tensor:
        """Latents (B, C, h, w) to latents (B, C, h, w)."""


class NoRefinement:
    """Leaves them as they are."""

    def __call__(
        self, backbone: Backbone, latents: Tensor, batch: SamplingBatch, noise: ImageNoise
    ) -> Tensor:
        """The latents."""
        return latents


class LatentOptimisation:
    """CaO2's second stage: moves a latent to where the denoiser errs least at little noise.

    With one noise n for each image and at every iteration a step j of its own, Adam lowers
    mean((n - eps)^2) + worst_weight max|n - eps| over z, where eps is the prediction for
    sqrt(abar_j) z + sqrt(1 - abar_j) n without classifier-free guidance. j is uniform in 1..upper
    of `steps` respaced steps. A row's numbers depend on its own stream alone.

    `timestep`: «matched» tells the network the training timestep that abar_j belongs to,
    «released» the step j itself, as the released scripts do.
    """

    reach = Reach.DENOISER

    def __init__(
        self,
        iterations: int,
        lr: float,
        steps: int,
        upper: int,
        worst_weight: float,
        label: str,
        timestep: str,
    ) -> None:
        """Raises `UserError` for a value that makes no sense, by its key."""
        self.iterations = checks.integer("refine.iterations", iterations, minimum=0)
        self.lr = checks.number("refine.lr", lr, minimum=0)
        self.steps = checks.integer("refine.steps", steps, minimum=2, maximum=1000)
        self.upper = checks.integer("refine.upper", upper, minimum=1, maximum=self.steps - 1)
        self.worst_weight = checks.number("refine.worst_weight", worst_weight, minimum=0)
        self.label = checks.choice("refine.label", label, ["none", "class"])
        self.timestep = checks.choice("refine.timestep", timestep, ["matched", "released"])
        self._batches = Batches(_ROWS, "refining")

    def __call__(
        self, backbone: Backbone, latents: Tensor, batch: SamplingBatch, noise: ImageNoise
    ) -> Tensor:
        """Latents (B, C, h, w), each moved by hardly more than iterations x lr per element."""
        if not self.iterations:
            return latents
        schedule = backbone.schedule.respaced(self.steps)
        kept = noise.initial().to(latents)  # (B, C, h, w)
        steps = torch.stack([self._steps(draw) for draw in noise.generators])  # (B, iterations)
        ids = batch.class_ids.to(latents.device)
        if self.label == "none":
            ids = torch.full_like(ids, backbone.null_class)
        moved: list[Tensor] = []
        for attempt in self._batches.attempts(torch.arange(len(latents), device=latents.device)):
            with attempt as rows:
                part = self._moved(
                    backbone, schedule, latents[rows], kept[rows], steps[rows.cpu()], ids[rows]
                )
            if attempt.error is None:
                moved.append(part)
        return torch.cat(moved)

    def _steps(self, draw: torch.Generator) -> Tensor:
        return torch.randint(1, self.upper + 1, (self.iterations,), generator=draw)

    def _moved(
        self,
        backbone: Backbone,
        schedule: SamplingSchedule,
        latents: Tensor,
        noise: Tensor,
        steps: Tensor,
        ids: Tensor,
    ) -> Tensor:
        """Latents (B, C, h, w) after all iterations at `steps` (B, iterations)."""
        z = latents.detach().clone()
        adam = torch.optim.Adam([z], lr=self.lr)
        times = torch.tensor(schedule.timesteps) if self.timestep == "matched" else None
        for j in steps.T:  # (B,)
            t = (j if times is None else times[j]).to(z.device)
            z.requires_grad_()
            with torch.enable_grad():
                loss = self.loss(backbone, z, noise, schedule.abar[j], t, ids)
                # summed: a row's gradient knows of no other, and neither does Adam
                (z.grad,) = torch.autograd.grad(loss.sum(), z)
            adam.step()
        return z.detach()

    def loss(
        self, backbone: Backbone, z: Tensor, noise: Tensor, abar: Tensor, t: Tensor, ids: Tensor
    ) -> Tensor:
        """Each row's (B,), for latents and noise (B, C, h, w), abar, timesteps and rows (B,)."""
        signal, noisy = (a.sqrt().to(z).view(-1, 1, 1, 1) for a in (abar, 1 - abar))
        gap = noise - backbone.predict(signal * z + noisy * noise, t, ids).eps
        worst = gap.abs().flatten(1).amax(dim=1)
        return gap.square().flatten(1).mean(dim=1) + self.worst_weight * worst

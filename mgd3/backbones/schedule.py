"""The Gaussian diffusion's constants, all float64: training schedule, respacing, posterior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mgd3.runtime.errors import UserError


def linear_alphas_cumprod(num_timesteps: int = 1000) -> Tensor:
    """abar_t of DiT's linear schedule, beta from 1e-4 to 0.02 inclusive (Ho et al. 2020). (T,)"""
    betas = torch.linspace(1e-4, 0.02, num_timesteps, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


def respaced_timesteps(num_timesteps: int, num_steps: int) -> list[int]:
    """Training timesteps visited by `num_steps` sampling steps, ascending, both ends included.

    The running sum of the stride is rounded half to even, as the original's (protocol: DiT's
    `space_timesteps`): 0, 20, 41, 61, 82 ... 999 for 50 of 1000.
    """
    stride = (num_timesteps - 1) / (num_steps - 1) if num_steps > 1 else 1.0
    timesteps, position = [], 0.0
    for _ in range(num_steps):
        timesteps.append(round(position))
        position += stride
    return timesteps


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """The noise that a backbone was trained with, and which of its timesteps samplers visit."""

    alphas_cumprod: Tensor  # (T,) float64, abar_t
    spacing: str = "even"  # even: both ends (DiT); leading: k T/S + offset; trailing: T - k T/S - 1
    offset: int = 0  # of «leading»: 1 for CompVis's models
    final_abar: float = 1.0  # what DDIM's last step goes to; abar_0 for CompVis's models

    def timesteps(self, num_steps: int) -> list[int]:
        """Training timesteps visited by `num_steps` sampling steps, ascending."""
        total = len(self.alphas_cumprod)
        if self.spacing == "even":
            return respaced_timesteps(total, num_steps)
        if self.spacing == "leading":
            timesteps = [k * (total // num_steps) + self.offset for k in range(num_steps)]
        else:
            timesteps = sorted(round(total - k * total / num_steps) - 1 for k in range(num_steps))
        if not total - 2 * (total // num_steps) <= timesteps[-1] < total:
            divisors = [d for d in range(2, total) if total % d == 0 and d <= total // 2]
            closest = min(divisors, key=lambda d: abs(d - num_steps))
            raise UserError(
                f"sampler.steps={num_steps} would start at timestep {timesteps[-1]} of 0.."
                f"{total - 1}, where this backbone's images are not pure noise; "
                f"try sampler.steps={closest}"
            )
        return timesteps

    def respaced(self, num_steps: int) -> SamplingSchedule:
        """The constants of `num_steps` sampling steps (IDDPM, eq. 19)."""
        timesteps = self.timesteps(num_steps)
        abar = self.alphas_cumprod.to("cpu", torch.float64)[timesteps]
        if abar[-1] <= 0:
            raise UserError(
                "this backbone's noise schedule ends in pure noise (zero terminal SNR), where the "
                "predicted noise says nothing of the image: use a checkpoint without it"
            )
        abar_prev = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        betas = 1 - abar / abar_prev
        variance = betas * (1 - abar_prev) / (1 - abar)
        variance[0] = variance[1] if num_steps > 1 else betas[0]  # log(0) otherwise
        return SamplingSchedule(
            timesteps=timesteps,
            abar=abar,
            abar_prev=abar_prev,
            final_abar=self.final_abar,
            x0_coefficient=betas * abar_prev.sqrt() / (1 - abar),
            x_t_coefficient=(1 - abar_prev) * (1 - betas).sqrt() / (1 - abar),
            log_variance_min=variance.log(),
            log_variance_max=betas.log(),
        )


@dataclass(frozen=True)
class SamplingSchedule:
    """Constants of the reverse process on respaced steps; index = sampling step. Tensors (S,)."""

    timesteps: list[int]
    abar: Tensor
    abar_prev: Tensor  # 1 after the last step
    final_abar: float  # DDIM's instead of that 1
    x0_coefficient: Tensor  # of x0_hat in the posterior mean
    x_t_coefficient: Tensor  # of x_t in the posterior mean
    log_variance_min: Tensor  # log posterior variance, entry 0 replaced by entry 1
    log_variance_max: Tensor  # log beta

    def predict_x0(self, x_t: Tensor, eps: Tensor, step: int) -> Tensor:
        """x0_hat = x_t / sqrt(abar) - sqrt(1/abar - 1) eps, not clipped. (B, C, h, w)"""
        abar = self.abar[step].item()
        return x_t / abar**0.5 - (1 / abar - 1) ** 0.5 * eps

    def log_variance(self, variance: Tensor | None, step: int) -> Tensor:
        """Learned: v in [-1, 1] moves between the two bounds. Fixed (v None): the lower one.

        The lower one is a number, () on the CPU, which multiplies a device's tensors uncopied.
        """
        low, high = self.log_variance_min[step].item(), self.log_variance_max[step].item()
        if variance is None:
            return torch.tensor(low)
        fraction = (variance + 1) / 2
        return fraction * high + (1 - fraction) * low

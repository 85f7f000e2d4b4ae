"""The diffusion training loss of DiT: noise MSE plus the variational bound of the variance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mgd3.backbones.schedule import SamplingSchedule


def on_device(schedule: SamplingSchedule, device: torch.device) -> SamplingSchedule:
    """The schedule's float64 constants where a training looks them up, copied once."""
    tensors = {k: v.to(device) for k, v in vars(schedule).items() if isinstance(v, Tensor)}
    return SamplingSchedule(**(vars(schedule) | tensors))


def add_noise(x0: Tensor, eps: Tensor, t: Tensor, schedule: SamplingSchedule) -> Tensor:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, (B, C, h, w) (paper eq. 1)."""
    abar = _rows(schedule.abar, t, x0)
    return abar.sqrt() * x0 + (1 - abar).sqrt() * eps


def diffusion_loss(
    out: Tensor, x0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor, schedule: SamplingSchedule
) -> Tensor:
    """L_simple + L_vlb of each row, (B,) (paper eq. 2; Nichol & Dhariwal 2021, section 3.1).

    `out` (B, 2C, h, w) is the network's noise and variance; the bound trains the variance alone.
    """
    eps_hat, variance = out.chunk(2, dim=1)
    simple = (eps - eps_hat).square().flatten(1).mean(dim=1)
    return simple + variational_bound(eps_hat.detach(), variance, x0, x_t, t, schedule)


def variational_bound(
    eps_hat: Tensor,
    variance: Tensor,
    x0: Tensor,
    x_t: Tensor,
    t: Tensor,
    schedule: SamplingSchedule,
) -> Tensor:
    """KL(q(x_{t-1} | x_t, x0) || p) in bits per dimension; at t = 0 the decoder's NLL. (B,)"""
    abar = _rows(schedule.abar, t, x0)
    x0_hat = x_t / abar.sqrt() - (1 / abar - 1).sqrt() * eps_hat
    c_x0, c_xt = (_rows(c, t, x0) for c in (schedule.x0_coefficient, schedule.x_t_coefficient))
    true_mean, mean = c_x0 * x0 + c_xt * x_t, c_x0 * x0_hat + c_xt * x_t
    low, high = (_rows(c, t, x0) for c in (schedule.log_variance_min, schedule.log_variance_max))
    fraction = (variance + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    kl = 0.5 * (
        log_variance
        - low
        - 1
        + (low - log_variance).exp()
        + (true_mean - mean).square() * (-log_variance).exp()
    )
    nll = -_discretised_log_likelihood(x0, mean, 0.5 * log_variance)
    bound = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl)
    return bound.flatten(1).mean(dim=1) / math.log(2)


def _discretised_log_likelihood(x0: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log of the Gaussian's mass in the 1/255-wide bin around x0 in [-1, 1], open at both ends."""
    inverse = (-log_sigma).exp()
    upper = torch.special.ndtr((x0 - mean + 1 / 255) * inverse)
    lower = torch.special.ndtr((x0 - mean - 1 / 255) * inverse)
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower))
    return mass.clamp(min=1e-12).log()


def _rows(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table.to(like)[t].view(-1, 1, 1, 1)

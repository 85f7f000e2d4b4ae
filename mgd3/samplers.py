"""Reverse processes: DDPM as in the released code, DDIM as in the paper's Algorithm 1.

A step takes x_t (B, C, h, w) to x_{t-1}; `_Sampler` walks the respaced steps. Rows belong to any
classes: nothing is shared between them but the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mgd3 import checks
from mgd3.schedule import SamplingSchedule
from mgd3.types import Backbone, DenoiseState, Guidance, NoiseSource, Prediction, UserError


def classifier_free(
    backbone: Backbone,
    x_t: Tensor,
    t: Tensor,
    class_ids: Tensor,
    cfg_scale: float,
    cfg_channels: int,
) -> Prediction:
    """eps_null + cfg_scale (eps_cond - eps_null) on the first `cfg_channels` channels.

    The other channels and the variance stay conditional, DiT's `forward_with_cfg`. Both halves
    see the same x_t and go through the network in one batch of 2B.
    """
    if cfg_scale == 1:
        return backbone.predict(x_t, t, class_ids)
    null = torch.full_like(class_ids, backbone.null_class)
    both = backbone.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([class_ids, null]))
    cond, uncond = both.eps.chunk(2)  # (B, C, h, w) each
    guided = uncond + cfg_scale * (cond - uncond)
    eps = torch.cat([guided[:, :cfg_channels], cond[:, cfg_channels:]], dim=1)
    variance = None if both.variance is None else both.variance.chunk(2)[0]
    return Prediction(eps=eps, variance=variance)


class _Sampler:
    """The walk that every sampler shares; a subclass gives one step."""

    def __init__(self, steps: int, cfg_scale: float, cfg_channels: int) -> None:
        self.steps = checks.integer("sampler.steps", steps, minimum=2, maximum=1000)
        self.cfg_scale = checks.number("sampler.cfg_scale", cfg_scale, minimum=0)
        self.cfg_channels = checks.integer("sampler.cfg_channels", cfg_channels, minimum=1)

    @torch.inference_mode()
    def __call__(
        self,
        backbone: Backbone,
        class_ids: Tensor,
        guidance: Guidance,
        modes: Tensor,
        noise: NoiseSource,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) for class_ids (B,); `modes` (B, C, h, w) is each row's own mode."""
        schedule = SamplingSchedule.respaced(backbone.alphas_cumprod, self.steps)
        x_t = noise.initial().to(modes)
        for step in reversed(range(self.steps)):
            t = torch.full_like(class_ids, schedule.timesteps[step])
            prediction = classifier_free(
                backbone, x_t, t, class_ids, self.cfg_scale, self.cfg_channels
            )
            x0_hat = schedule.predict_x0(x_t, prediction.eps, step)
            g_t = guidance(DenoiseState(step=step, x_t=x_t, x0_hat=x0_hat), modes)
            x_t = self._step(schedule, step, x_t, x0_hat, prediction, g_t, noise)
            if on_step is not None:
                on_step()
        return x_t

    def _step(
        self,
        schedule: SamplingSchedule,
        step: int,
        x_t: Tensor,
        x0_hat: Tensor,
        prediction: Prediction,
        g_t: Tensor,
        noise: NoiseSource,
    ) -> Tensor:
        raise NotImplementedError


class DDPM(_Sampler):
    """x_{t-1} = mu_t + sigma_t g_t + sigma_t z, no noise at the last step.

    g_t shifts the posterior mean by the *sampled* sigma, as the released code does; eq. 6 as
    printed would push away from the mode. `variance`: the network's own («learned», DiT) or the
    posterior's lower bound («fixed», for networks that predict none).
    """

    def __init__(
        self, steps: int, cfg_scale: float, cfg_channels: int, variance: str = "learned"
    ) -> None:
        super().__init__(steps, cfg_scale, cfg_channels)
        self.variance = checks.choice("sampler.variance", variance, ["learned", "fixed"])

    def _step(
        self,
        schedule: SamplingSchedule,
        step: int,
        x_t: Tensor,
        x0_hat: Tensor,
        prediction: Prediction,
        g_t: Tensor,
        noise: NoiseSource,
    ) -> Tensor:
        learned = prediction.variance if self.variance == "learned" else None
        if self.variance == "learned" and learned is None:
            raise UserError(
                "sampler.variance=learned needs a backbone that predicts its variance; "
                "this one does not: set sampler.variance=fixed"
            )
        sigma = (0.5 * schedule.log_variance(learned, step)).exp().to(x_t)
        mean = (
            schedule.x0_coefficient[step].item() * x0_hat
            + schedule.x_t_coefficient[step].item() * x_t
        )
        if step == 0:
            return mean + sigma * g_t
        return mean + sigma * (g_t + noise.step().to(x_t))


class DDIM(_Sampler):
    """The paper's Algorithm 1, eta 0: eps_hat = eps - sqrt(1 - abar_t) g_t in both places."""

    def _step(
        self,
        schedule: SamplingSchedule,
        step: int,
        x_t: Tensor,
        x0_hat: Tensor,
        prediction: Prediction,
        g_t: Tensor,
        noise: NoiseSource,
    ) -> Tensor:
        abar, abar_prev = schedule.abar[step].item(), schedule.abar_prev[step].item()
        eps_hat = prediction.eps - (1 - abar) ** 0.5 * g_t
        x0_steered = schedule.predict_x0(x_t, eps_hat, step)
        return abar_prev**0.5 * x0_steered + (1 - abar_prev) ** 0.5 * eps_hat

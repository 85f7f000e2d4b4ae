"""Reverse processes: DDPM as released, DDIM as in the paper's Algorithm 1 or as released.

A step takes x_t (B, C, h, w) to x_{t-1}; `_Sampler` walks the respaced steps. Rows belong to any
classes: nothing is shared between them but the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from mgd3.backbones.contract import DiffusionModel, Prediction
from mgd3.backbones.schedule import SamplingSchedule
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.starts import NoiseStart, Start
from mgd3.sampling.terms import DenoiseState, Guidance, Reach, SamplingBatch, has_twin, reach_of


def classifier_free(
    backbone: DiffusionModel,
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
    halves = _halves(backbone, x_t, t, class_ids)
    return _with_guided_channels(halves[0], halves, cfg_scale, cfg_channels)


def classifier_free_pair(
    backbone: DiffusionModel,
    x_t: Tensor,
    t: Tensor,
    class_ids: Tensor,
    cfg_scale: float,
    cfg_channels: int,
) -> tuple[Prediction, Prediction]:
    """What DiT's `forward_with_cfg` gives both rows of its pair: `classifier_free`, and the twin's.

    The twin's guided channels are the same; the others and its variance are unconditional.
    """
    halves = _halves(backbone, x_t, t, class_ids)
    own, twin = (_with_guided_channels(h, halves, cfg_scale, cfg_channels) for h in halves)
    return own, twin


def _halves(
    backbone: DiffusionModel, x_t: Tensor, t: Tensor, class_ids: Tensor
) -> tuple[Prediction, Prediction]:
    """The conditional and the unconditional prediction, from one batch of 2B."""
    null = torch.full_like(class_ids, backbone.null_class)
    both = backbone.predict(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([class_ids, null]))
    variances = (None, None) if both.variance is None else both.variance.chunk(2)
    cond, uncond = (
        Prediction(eps=eps, variance=variance)
        for eps, variance in zip(both.eps.chunk(2), variances, strict=True)
    )
    return cond, uncond


def _with_guided_channels(
    row: Prediction, halves: tuple[Prediction, Prediction], cfg_scale: float, cfg_channels: int
) -> Prediction:
    """One half with the guided noise in its first channels."""
    cond, uncond = (half.eps for half in halves)
    guided = uncond + cfg_scale * (cond - uncond)
    eps = torch.cat([guided[:, :cfg_channels], row.eps[:, cfg_channels:]], dim=1)
    return Prediction(eps=eps, variance=row.variance)


_PUBLISHED_CFG_CHANNELS = 4  # DiT's own code guides 3, diffusers' 4


class NoiseSource(Protocol):
    """Where a batch's random numbers come from; drawn strictly in order."""

    def initial(self) -> Tensor:
        """x_T, (B, C, h, w)."""

    def step(self) -> Tensor:
        """The next reverse step's z, (B, C, h, w)."""


class _Twin:
    """The other row of the released pair, which IGD's released code decodes, too.

    It starts where its row does, is given the prediction for its row, which never looked at it, and
    is not steered. Where the sampler draws noise its own differs, and what it becomes is noise;
    under DDIM it is its row without guidance.
    """

    def __init__(self, x_t: Tensor, batch: SamplingBatch, steps: int) -> None:
        self._x_t, self._x0, self.prediction = x_t, x_t, Prediction(eps=x_t)
        shape = cast(tuple[int, int, int], tuple(x_t.shape[1:]))
        self._noise = ImageNoise(batch.seed, batch.images, shape, x_t.device, steps - 1, "twin")

    def estimate(self, schedule: SamplingSchedule, step: int) -> Tensor:
        """Its clean image, (B, C, h, w), attached to what the prediction is attached to."""
        x0 = schedule.predict_x0(self._x_t, self.prediction.eps, step)
        self._x0, self.prediction = x0.detach(), self.prediction.detached()
        return x0

    def step(self, sampler: _Sampler, schedule: SamplingSchedule, state: DenoiseState) -> None:
        """Take it to x_{t-1}, unguided as released."""
        gain = sampler.gain(schedule, self.prediction, state.step)
        own = replace(state, x_t=self._x_t, x0_hat=self._x0, x0_twin=None, gain=gain)
        g_t = torch.zeros_like(self._x_t)
        now = ReverseStep(schedule=schedule, state=own, prediction=self.prediction, g_t=g_t)
        self._x_t = sampler.previous(now, self._noise)


@dataclass(frozen=True, kw_only=True)
class ReverseStep:
    """Everything that x_{t-1} is made of; tensors are (B, C, h, w)."""

    schedule: SamplingSchedule
    state: DenoiseState
    prediction: Prediction
    g_t: Tensor


class _Sampler:
    """The walk that every sampler shares; a subclass gives one step."""

    def __init__(self, steps: int, cfg_scale: float, cfg_channels: int) -> None:
        self.steps = checks.integer("sampler.steps", steps, minimum=2, maximum=1000)
        self.cfg_scale = checks.number("sampler.cfg_scale", cfg_scale, minimum=0)
        self.cfg_channels = checks.integer("sampler.cfg_channels", cfg_channels, minimum=1)

    @torch.no_grad()
    def __call__(
        self,
        backbone: DiffusionModel,
        batch: SamplingBatch,
        guidance: Guidance,
        noise: NoiseSource,
        start: Start | None = None,
        on_step: Callable[[DenoiseState], None] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of a batch, each row steered as `guidance` says.

        `start` None begins in pure noise; `on_step` sees every state before its step is taken.
        """
        # what is published goes with any: of fewer channels, all are guided
        most = max(backbone.latent_shape[0], _PUBLISHED_CFG_CHANNELS)
        checks.integer("sampler.cfg_channels", self.cfg_channels, maximum=most)
        start, term = start or NoiseStart(), guidance.bind(batch)
        schedule = backbone.schedule.respaced(self.steps)
        x_t = start.initial(schedule, batch, noise.initial().to(batch.modes))
        twin = _Twin(x_t, batch, start.steps(self.steps)) if has_twin(term) else None
        for step in reversed(range(start.steps(self.steps))):
            reach = reach_of(term, step)
            if reach:
                x_t = x_t.detach().requires_grad_()
            t = torch.full_like(batch.class_ids, schedule.timesteps[step])
            with torch.set_grad_enabled(reach is Reach.DENOISER):
                asked = backbone, x_t, t, batch.class_ids, self.cfg_scale, self.cfg_channels
                if twin is None:
                    prediction = classifier_free(*asked)
                else:
                    prediction, twin.prediction = classifier_free_pair(*asked)
            with torch.set_grad_enabled(reach is not Reach.NONE):
                x0_hat = schedule.predict_x0(x_t, prediction.eps, step)
                x0_twin = None if twin is None else twin.estimate(schedule, step)
            if reach:  # whose graph x0_hat alone holds from here on, and lets go of below
                prediction = prediction.detached()
            state = DenoiseState(
                step=step,
                num_steps=self.steps,
                x_t=x_t,
                x0_hat=x0_hat,
                x0_twin=x0_twin,
                images=batch.images,
                eps=prediction.eps,
                t=schedule.timesteps[step],
                abar=schedule.abar[step].item(),
                gain=self.gain(schedule, prediction, step),
                eps_gain=self.eps_gain(schedule, step),
            )
            if on_step is not None:
                on_step(state)
            g_t = term(state)
            if reach:
                x_t, x0_hat, x0_twin = x_t.detach(), x0_hat.detach(), None
                state = replace(state, x_t=x_t, x0_hat=x0_hat, x0_twin=None)
            if twin is not None:
                twin.step(self, schedule, state)
            now = ReverseStep(schedule=schedule, state=state, prediction=prediction, g_t=g_t)
            x_t = self.previous(now, noise)
        return x_t

    def gain(self, schedule: SamplingSchedule, prediction: Prediction, step: int) -> Tensor | float:
        """What g_t is multiplied by where it enters x_{t-1}: a number, or (B, C, h, w)."""
        raise NotImplementedError

    def eps_gain(self, schedule: SamplingSchedule, step: int) -> float:
        """d x_{t-1} / d eps, of a deterministic step."""
        abar, before = schedule.abar[step].item(), _abar_prev(schedule, step)
        return (1 - before) ** 0.5 - (before * (1 - abar) / abar) ** 0.5

    def previous(self, now: ReverseStep, noise: NoiseSource) -> Tensor:
        """x_{t-1}, (B, C, h, w)."""
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

    def gain(self, schedule: SamplingSchedule, prediction: Prediction, step: int) -> Tensor | float:
        """sigma_t, the sampled one: (B, C, h, w) where it is learned."""
        learned = prediction.variance if self.variance == "learned" else None
        if self.variance == "learned" and learned is None:
            raise UserError(
                "sampler.variance=learned needs a backbone that predicts its variance; "
                "this one does not: set sampler.variance=fixed"
            )
        return (0.5 * schedule.log_variance(learned, step)).exp()

    def eps_gain(self, schedule: SamplingSchedule, step: int) -> float:
        """-c_x0 sqrt(1/abar - 1): the posterior mean holds eps through x0_hat alone."""
        abar = schedule.abar[step].item()
        return -schedule.x0_coefficient[step].item() * (1 / abar - 1) ** 0.5

    def previous(self, now: ReverseStep, noise: NoiseSource) -> Tensor:
        """x_{t-1}, (B, C, h, w)."""
        sigma = now.state.gain
        c_x0, c_xt = (
            now.schedule.x0_coefficient[now.state.step],
            now.schedule.x_t_coefficient[now.state.step],
        )
        mean = c_x0.item() * now.state.x0_hat + c_xt.item() * now.state.x_t
        if now.state.step == 0:
            return mean + sigma * now.g_t
        return mean + sigma * (now.g_t + noise.step().to(now.state.x_t))


class DDIM(_Sampler):
    """The paper's Algorithm 1, eta 0: eps_hat = eps - sqrt(1 - abar_t) g_t in both places."""

    def gain(self, schedule: SamplingSchedule, prediction: Prediction, step: int) -> float:
        """-sqrt(1 - abar_t) d x_{t-1} / d eps."""
        return -((1 - schedule.abar[step].item()) ** 0.5) * self.eps_gain(schedule, step)

    def previous(self, now: ReverseStep, noise: NoiseSource) -> Tensor:
        """x_{t-1}, (B, C, h, w)."""
        abar = now.schedule.abar[now.state.step].item()
        eps_hat = now.prediction.eps - (1 - abar) ** 0.5 * now.g_t
        x0_steered = now.schedule.predict_x0(now.state.x_t, eps_hat, now.state.step)
        return _deterministic(now, x0_steered, eps_hat)


class ReleasedDDIM(_Sampler):
    """DDIM as the released text-to-image fork steps it, eta 0: sqrt(abar_t) g_t beside the step.

    x_{t-1} = sqrt(abar_{t-1}) x0_hat + sqrt(1 - abar_{t-1}) eps + sqrt(abar_t) g_t (its
    scheduling_ddim_mode_guidance.py; its std is 0 at eta 0). It pulls late, where abar_t is large,
    Algorithm 1 and DDPM early.
    """

    def gain(self, schedule: SamplingSchedule, prediction: Prediction, step: int) -> float:
        """sqrt(abar_t)."""
        return schedule.abar[step].item() ** 0.5

    def previous(self, now: ReverseStep, noise: NoiseSource) -> Tensor:
        """x_{t-1}, (B, C, h, w)."""
        plain = _deterministic(now, now.state.x0_hat, now.prediction.eps)
        return plain + now.state.gain * now.g_t


def _deterministic(now: ReverseStep, x0: Tensor, eps: Tensor) -> Tensor:
    """sqrt(abar_{t-1}) x0 + sqrt(1 - abar_{t-1}) eps, (B, C, h, w)."""
    abar_prev = _abar_prev(now.schedule, now.state.step)
    return abar_prev**0.5 * x0 + (1 - abar_prev) ** 0.5 * eps


def _abar_prev(schedule: SamplingSchedule, step: int) -> float:
    """abar of where a deterministic step goes to."""
    return schedule.abar_prev[step].item() if step else schedule.final_abar

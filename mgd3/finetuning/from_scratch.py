"""Training a small diffusion transformer from scratch on encoded real images."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from mgd3.backbones.schedule import NoiseSchedule, linear_alphas_cumprod
from mgd3.backbones.weights.dit_weights import constructor_arguments
from mgd3.finetuning.averaged_training import AveragedTraining
from mgd3.finetuning.losses import add_noise, diffusion_loss, on_device
from mgd3.runtime import checks
from mgd3.runtime.compute import autocast, check_training_precision, to_device, training_in
from mgd3.runtime.progress import progress
from mgd3.runtime.seeding import stream
from mgd3.runtime.stopping import held


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Optimisation of a backbone; durations are in steps."""

    steps: int
    batch_size: int
    lr: float  # peak; linear warm-up, then cosine to 0
    warmup_steps: int
    weight_decay: float
    ema_decay: float
    label_dropout: float  # share of rows trained without their class, for classifier-free guidance
    precision: str  # float32, tf32 or bfloat16 (autocast)
    seed: int
    checkpoint_steps: int

    def __post_init__(self) -> None:
        checks.integer("train.steps", self.steps, minimum=1)
        checks.integer("train.batch_size", self.batch_size, minimum=1)
        checks.number("train.lr", self.lr, minimum=0)
        checks.integer("train.warmup_steps", self.warmup_steps, minimum=0)
        checks.number("train.weight_decay", self.weight_decay, minimum=0)
        checks.integer("train.seed", self.seed, minimum=0)
        checks.number("train.ema_decay", self.ema_decay, minimum=0, maximum=1)
        checks.number("train.label_dropout", self.label_dropout, minimum=0, maximum=1)
        check_training_precision(self.precision)
        checks.integer("train.checkpoint_steps", self.checkpoint_steps, minimum=1)

    def lr_factor(self, step: int) -> float:
        """Multiplies `lr` at this step."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return warm * 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * step / self.steps))))


class Trainer:
    """Network, its exponential moving average and its optimiser; goes on from a checkpoint.

    Step s draws everything from the stream of (seed, s), so a killed training ends with the same
    weights as one that ran through.
    """

    def __init__(
        self,
        network: DiTTransformer2DModel,
        settings: TrainSettings,
        checkpoint: Path,
        data: str,
        compiled: bool = False,
    ) -> None:
        """`data` identifies what is trained on; a checkpoint of other data is refused.

        `compiled` runs the network through torch.compile: a minute at first, faster then.
        """
        self.network = network.eval()  # diffusers' own label dropout differs from block to block
        self._forward = torch.compile(network) if compiled else network
        self._compiles = compiled
        self.settings = settings
        self.state = AveragedTraining(
            dict(network.named_parameters()),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            ema_decay=settings.ema_decay,
            checkpoint=checkpoint,
            made_from={
                "settings": json.dumps(asdict(settings), sort_keys=True),
                "network": constructor_arguments(network),
                "data": data,
            },
            lr_key="train.lr",
        )
        schedule = NoiseSchedule(alphas_cumprod=linear_alphas_cumprod()).respaced(1000)
        self._schedule = on_device(schedule, next(network.parameters()).device)

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.state.step

    @property
    def losses(self) -> list[float]:
        """Of every finished step."""
        return self.state.losses

    def train(
        self,
        latents: Tensor,
        class_ids: Tensor,
        export: Callable[[Trainer], None],
        show: Callable[[Trainer], object] = lambda trainer: None,
    ) -> None:
        """Train on latents (N, C, h, w) of class_ids (N,) up to `settings.steps`.

        At each checkpoint `export` sees the averaged weights before it is written, `show` after
        it: a signal waits for a step and for the checkpoint, not for what `show` draws.
        """
        settings = self.settings
        what, done = "training the backbone", self.step
        with progress(what, settings.steps, "steps", done, compiles=self._compiles) as advance:
            while self.step < settings.steps:
                with held() as asked:
                    self._to_checkpoint(latents, class_ids, advance, asked, export)
                with self.state.averaged():
                    show(self)

    def _to_checkpoint(
        self,
        latents: Tensor,
        class_ids: Tensor,
        advance: Callable[..., None],
        asked: Callable[[], bool],
        export: Callable[[Trainer], None],
    ) -> None:
        """Train up to the next checkpoint and write it, earlier where that is asked for."""
        settings = self.settings
        while True:
            with training_in(settings.precision):
                loss = self._loss(latents, class_ids)
                self.state.learn(loss, settings.lr_factor(self.step))
            advance(1, note=f"loss {self.state.recent_loss:.4f}")
            due = self.step % settings.checkpoint_steps == 0 or self.step == settings.steps
            if due or asked():
                break
        if due:
            with self.state.averaged():
                export(self)  # first: a checkpoint says that its export is done
        self.state.save()

    def _loss(self, latents: Tensor, class_ids: Tensor) -> Tensor:
        settings, device = self.settings, latents.device
        draw = stream("train", settings.seed, self.step)
        rows = torch.randint(len(latents), (settings.batch_size,), generator=draw)
        t = torch.randint(1000, (settings.batch_size,), generator=draw)
        dropped = torch.rand(settings.batch_size, generator=draw) < settings.label_dropout
        eps = torch.randn((settings.batch_size, *latents.shape[1:]), generator=draw)
        rows, t, dropped, eps = to_device((rows, t, dropped, eps), device)
        x0, null = latents[rows], self.network.config.num_embeds_ada_norm
        labels = torch.where(dropped, null, class_ids[rows])
        x_t = add_noise(x0, eps, t, self._schedule)
        with autocast(settings.precision, device):
            out = self._forward(x_t, timestep=t, class_labels=labels).sample
        return diffusion_loss(out.float(), x0, x_t, eps, t, self._schedule).mean()

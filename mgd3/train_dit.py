"""Training a small diffusion transformer from scratch on encoded real images."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from mgd3 import checks
from mgd3.artifacts import CorruptFileError, load_tensors, save_tensors
from mgd3.backbones.dit_weights import constructor_arguments
from mgd3.losses import add_noise, diffusion_loss
from mgd3.progress import progress
from mgd3.schedule import NoiseSchedule, linear_alphas_cumprod
from mgd3.seeding import stream
from mgd3.types import UserError

log = logging.getLogger(__name__)


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
    precision: str  # float32 or bfloat16 (autocast)
    seed: int
    checkpoint_steps: int

    def __post_init__(self) -> None:
        checks.integer("train.steps", self.steps, minimum=1)
        checks.integer("train.batch_size", self.batch_size, minimum=1)
        checks.number("train.lr", self.lr, minimum=0)
        checks.number("train.ema_decay", self.ema_decay, minimum=0, maximum=1)
        checks.number("train.label_dropout", self.label_dropout, minimum=0, maximum=1)
        checks.choice("train.precision", self.precision, ["float32", "bfloat16"])
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
    ) -> None:
        """`data` identifies what is trained on; a checkpoint of other data is refused."""
        self.network = network.eval()  # diffusers' own label dropout differs from block to block
        self.settings = settings
        self.checkpoint = checkpoint
        self._made_from = {
            "settings": json.dumps(asdict(settings), sort_keys=True),
            "network": constructor_arguments(network),
            "data": data,
        }
        self.step = 0
        self.losses: list[float] = []
        self.parameters = dict(network.named_parameters())
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self._schedule = NoiseSchedule(alphas_cumprod=linear_alphas_cumprod()).respaced(1000)
        if checkpoint.is_file():
            self._restore()

    def train(
        self, latents: Tensor, class_ids: Tensor, on_checkpoint: Callable[[Trainer], None]
    ) -> None:
        """Train on latents (N, C, h, w) of class_ids (N,) up to `settings.steps`."""
        settings = self.settings
        with progress("training the backbone", settings.steps) as advance:
            advance(self.step)
            while self.step < settings.steps:
                loss = self._one_step(latents, class_ids)
                self.losses.append(loss)
                self.step += 1
                advance(1, note=f"loss {sum(self.losses[-100:]) / len(self.losses[-100:]):.4f}")
                if self.step % settings.checkpoint_steps == 0 or self.step == settings.steps:
                    with self.averaged():
                        on_checkpoint(self)  # first: a checkpoint says that its export is done
                    self._save()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The network holds the averaged weights inside this block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _one_step(self, latents: Tensor, class_ids: Tensor) -> float:
        settings, device = self.settings, latents.device
        draw = stream("train", settings.seed, self.step)
        rows = torch.randint(len(latents), (settings.batch_size,), generator=draw)
        t = torch.randint(1000, (settings.batch_size,), generator=draw).to(device)
        dropped = torch.rand(settings.batch_size, generator=draw) < settings.label_dropout
        x0, labels = latents[rows], class_ids[rows].clone()
        eps = torch.randn(x0.shape, generator=draw).to(device)
        labels[dropped] = self.network.config.num_embeds_ada_norm
        x_t = add_noise(x0, eps, t, self._schedule)
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"):
            out = self.network(x_t, timestep=t, class_labels=labels).sample
        loss = diffusion_loss(out.float(), x0, x_t, eps, t, self._schedule).mean()
        if not loss.isfinite():
            raise UserError(
                f"the training loss is {loss.item()} at step {self.step}; lower train.lr (now "
                f"{settings.lr}); the last good checkpoint is {self.checkpoint}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * settings.lr_factor(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        current = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)
        return loss.item()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def _save(self) -> None:
        state = {f"network.{k}": p.detach() for k, p in self.parameters.items()}
        state |= {f"average.{k}": p for k, p in self.average.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}.{name}"] = self.optimizer.state[parameter][moment]
        state["step"] = torch.tensor(self.step)
        state["losses"] = torch.tensor(self.losses)
        save_tensors(self.checkpoint, state, self._made_from)

    def _restore(self) -> None:
        try:
            state = load_tensors(self.checkpoint, self._made_from)
        except CorruptFileError as error:
            raise UserError(f"{error}; delete it to train from the start") from error
        self.step, self.losses = int(state["step"]), state["losses"].tolist()
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[f"network.{name}"])
            self.average[name].copy_(state[f"average.{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=parameter.device),
                "exp_avg": state[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device),
            }
        log.info("going on from step %d of %s", self.step, self.checkpoint)

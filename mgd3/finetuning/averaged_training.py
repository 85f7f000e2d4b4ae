"""AdamW with an exponential moving average of the weights, resumable to the same result."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mgd3.finetuning.loss_record import Losses
from mgd3.runtime.errors import CorruptFileError, UserError, reading
from mgd3.storage.tensors import load_tensors, save_tensors

log = logging.getLogger(__name__)


class AveragedTraining:
    """Parameters, their average, their optimiser; goes on from `checkpoint` if it is there."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lr: float,
        weight_decay: float,
        ema_decay: float,
        checkpoint: Path,
        made_from: dict[str, str],
        lr_key: str,
        warm_average: bool = True,
    ) -> None:
        """`made_from` identifies the training: a checkpoint of another one is refused.

        `lr_key` names the learning rate to a user;
        `warm_average` shortens the average's memory in the first steps.
        """
        self.parameters = dict(parameters)
        self.average = {k: p.detach().clone() for k, p in self.parameters.items()}
        self.step = 0
        self._losses = Losses(self._diverged)
        self.extra: dict[str, Tensor] = {}  # what else a step depends on, kept with a checkpoint
        self._lr_key = lr_key
        self._lr, self._ema_decay, self._warm = lr, ema_decay, warm_average
        self._checkpoint, self._made_from = checkpoint, made_from
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=lr, weight_decay=weight_decay, fused=True
        )
        if checkpoint.is_file():
            self._restore()

    def learn(self, loss: Tensor, lr_factor: float = 1.0) -> None:
        """One step down the gradient of `loss`; `UserError` if it, or one before, is not finite."""
        self._losses.add(loss)
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr * lr_factor
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        warm = (1 + self.step) / (10 + self.step) if self._warm else 1.0
        decay = min(self._ema_decay, warm)
        current = [p.detach() for p in self.parameters.values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)
        self.step += 1

    @property
    def losses(self) -> list[float]:
        """Of every finished step; `UserError` if one is not finite."""
        return self._losses.all()

    @property
    def recent_loss(self) -> float:
        """Mean of the last hundred steps that have been looked at."""
        return self._losses.recent(100)

    def _diverged(self, step: int, loss: float) -> UserError:
        return UserError(
            f"the training loss is {loss} at step {step}; lower {self._lr_key} (now {self._lr}); "
            f"the last good checkpoint is {self._checkpoint}"
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The parameters hold their averages inside this block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def save(self) -> None:
        """Write the checkpoint; `UserError`, and none, after a loss that is not finite."""
        losses = torch.tensor(self.losses)
        state = {f"network.{k}": p.detach() for k, p in self.parameters.items()}
        state |= {f"average.{k}": p for k, p in self.average.items()}
        for name, parameter in self.parameters.items():
            for moment in ("exp_avg", "exp_avg_sq"):
                state[f"{moment}.{name}"] = self._optimizer.state[parameter][moment]
        state |= {f"extra.{k}": v for k, v in self.extra.items()}
        state["step"] = torch.tensor(self.step)
        state["losses"] = losses
        save_tensors(self._checkpoint, state, self._made_from)

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def _restore(self) -> None:
        try:
            state = load_tensors(self._checkpoint, self._made_from)
        except CorruptFileError as error:
            raise UserError(f"{error}; delete it to train from the start") from error
        with reading(self._checkpoint, "delete it to train from the start"):
            self._take(state)
        log.info("going on from step %d of %s", self.step, self._checkpoint)

    def _take(self, state: dict[str, Tensor]) -> None:
        self.step = int(state["step"])
        self._losses.restore(state["losses"].tolist())
        self.extra = {
            k.removeprefix("extra."): v for k, v in state.items() if k.startswith("extra.")
        }
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state[f"network.{name}"])
            self.average[name].copy_(state[f"average.{name}"])
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(self.step), device=parameter.device),
                "exp_avg": state[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": state[f"exp_avg_sq.{name}"].to(parameter.device),
            }

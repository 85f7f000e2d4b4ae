"""Training one student from scratch on a small set that stays on the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.augment import Augmentation, cutmix, normalise
from mgd3.artifacts import CorruptFileError, load_tensors, save_tensors
from mgd3.seeding import stream
from mgd3.types import UserError

log = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 120.0
_TEST_BATCH = 64  # ConvNet-6 at 224 px holds 50 MB an image


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One student's optimisation; durations are in epochs."""

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    milestones: tuple[int, ...]  # epochs after which lr is multiplied by gamma
    gamma: float
    cutmix_probability: float  # of a batch; the mixing share is Beta(1, 1), that is uniform
    test_every: int
    precision: str  # float32 or bfloat16 (autocast)


@dataclass
class History:
    """Test accuracies of one student in percent, by epoch."""

    tested: list[tuple[int, float]] = field(default_factory=list)
    train_seconds: float = 0.0
    test_seconds: float = 0.0
    just_tested: bool = False  # did the epoch that ended last end with a test?

    @property
    def top1_last(self) -> float:
        """After the last epoch."""
        return self.tested[-1][1]

    @property
    def top1_best(self) -> float:
        """The best of all tests: model selection on the test set, as the papers report."""
        return max(top1 for _, top1 in self.tested)


class StudentTraining:
    """A student, its optimiser and its history; goes on from a checkpoint of its own.

    Epoch e draws everything from the stream of (seed, e), so that a killed training gives the
    same student as one that ran through.
    """

    def __init__(
        self,
        student: nn.Module,
        recipe: Recipe,
        augmentation: Augmentation,
        seed: int,
        checkpoint: Path,
        weights: Tensor | None = None,
    ) -> None:
        """`weights` (N,) multiplies each image's loss; None is one for all."""
        self.weights = weights
        self.student = student
        self.recipe = recipe
        self.augmentation = augmentation
        self.seed = seed
        self.checkpoint = checkpoint
        self.epoch = 0  # finished epochs
        self.history = History()
        self.optimizer = torch.optim.SGD(
            student.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
        )
        if checkpoint.is_file():
            self._restore()

    def fit(
        self,
        pixels: Tensor,
        labels: Tensor,
        test: tuple[Tensor, Tensor],
        on_epoch: Callable[[History], None],
    ) -> History:
        """Train on pixels (N, 3, H, W) uint8, labels (N,); test on the same kind of pair."""
        recipe, saved = self.recipe, time.monotonic()
        while self.epoch < recipe.epochs:
            start = time.monotonic()
            self.one_epoch(pixels, labels)
            self.epoch += 1
            self.history.train_seconds += time.monotonic() - start
            due = self.epoch % recipe.test_every == 0 or self.epoch == recipe.epochs
            self.history.just_tested = due
            if due:
                start = time.monotonic()
                self.history.tested.append((self.epoch, self.accuracy(*test)))
                self.history.test_seconds += time.monotonic() - start
            on_epoch(self.history)
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                self._save()
                saved = time.monotonic()
        return self.history

    @torch.inference_mode()
    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Top-1 in percent on pixels (N, 3, H, W) uint8 that are already cropped."""
        self.student.eval()
        correct = 0
        for images, target in zip(
            pixels.split(_TEST_BATCH), labels.split(_TEST_BATCH), strict=True
        ):
            with self._autocast(pixels.device):
                logits = self.student(normalise(images.float() / 255))
            correct += int((logits.argmax(dim=1) == target).sum())
        return 100 * correct / len(labels)

    def one_epoch(self, pixels: Tensor, labels: Tensor) -> None:
        """One pass over pixels (N, 3, H, W) uint8 in an order of this epoch's own."""
        recipe = self.recipe
        draw = stream("student", self.seed, self.epoch)
        drops = sum(self.epoch >= m for m in recipe.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.gamma**drops
        self.student.train()
        total = torch.zeros((), device=pixels.device)
        for rows in torch.randperm(len(pixels), generator=draw).split(recipe.batch_size):
            rows = rows.to(pixels.device)
            images, target = self.augmentation(pixels[rows], draw), labels[rows]
            mixed, share = target, 1.0
            if torch.rand((), generator=draw) < recipe.cutmix_probability:
                images, permutation, share = cutmix(images, draw)
                mixed = target[permutation]
            with self._autocast(pixels.device):
                logits = self.student(images).float()
            weights = None if self.weights is None else self.weights[rows]
            loss = share * _cross_entropy(logits, target, weights)
            if share < 1:
                weights = None if weights is None else weights[permutation]
                loss = loss + (1 - share) * _cross_entropy(logits, mixed, weights)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        if not total.isfinite():
            raise UserError(
                f"the student's loss is not finite in epoch {self.epoch}; lower protocol.lr "
                f"(now {recipe.lr})"
            )

    def _autocast(self, device: torch.device) -> torch.autocast:
        enabled = self.recipe.precision == "bfloat16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)

    def _state(self) -> dict[str, Tensor]:
        """Live tensors: weights and buffers, and momenta once there are any."""
        state = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        for name, parameter in self.student.named_parameters():
            momentum = self.optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                state[f"momentum.{name}"] = momentum
        return state

    def _save(self) -> None:
        tested = torch.tensor(self.history.tested, dtype=torch.float64).view(-1, 2)
        seconds = torch.tensor([self.history.train_seconds, self.history.test_seconds])
        extra = {"epoch": torch.tensor(self.epoch), "tested": tested, "seconds": seconds}
        save_tensors(self.checkpoint, self._state() | extra, {})

    def _restore(self) -> None:
        try:
            state = load_tensors(self.checkpoint)
        except CorruptFileError as error:
            log.warning("%s; training this student from the start", error)
            return
        self.epoch = int(state["epoch"])
        self.history.tested = [(int(e), top1) for e, top1 in state["tested"].tolist()]
        self.history.train_seconds, self.history.test_seconds = state["seconds"].tolist()
        self.student.load_state_dict(
            {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
        )
        for name, parameter in self.student.named_parameters():
            if (momentum := state.get(f"momentum.{name}")) is not None:
                self.optimizer.state[parameter]["momentum_buffer"] = momentum.to(parameter.device)


def _cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """The batch's mean, each row times its weight."""
    if weights is None:
        return F.cross_entropy(logits, target)
    return (weights * F.cross_entropy(logits, target, reduction="none")).mean()

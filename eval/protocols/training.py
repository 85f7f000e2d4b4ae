"""Training one student from scratch on a small set that stays on the device."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Generator, Tensor, nn

from eval.protocols.augmentation import normalise
from eval.protocols.recipe import Objective, Recipe
from eval.students.dropout import masks_from, part_of_batch, remembers_passes
from mgd3.runtime.batching import Batches, free_bytes
from mgd3.runtime.compute import autocast, to_device, training_in
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import CorruptFileError, UserError, reading
from mgd3.runtime.stopping import held
from mgd3.storage.tensors import load_tensors, save_tensors

log = logging.getLogger(__name__)

_CHECKPOINT_SECONDS = 120.0
_LONG_EPOCH = 2.0  # seconds: longer than a signal should wait
_TEST_BATCH = 64
_TEST_BYTES = 1024  # a pixel: two layers of ConvNet's 128 channels in float32, 50 MB of 224 px
_TEST_SHARE = 0.5  # of the free memory; where it is not enough for a student, batches are halved
_TEST_ROOM = 2**32  # bytes, 64 images of 256 px: enough for a GPU, which others may share
_LARGEST_TEST = 1024


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

    Each epoch draws everything from a stream of its own, so that a killed training gives the same
    student as one that ran through.
    """

    def __init__(
        self,
        student: nn.Module,
        recipe: Recipe,
        objective: Objective,
        seed: int,
        checkpoint: Path,
        compiled: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        """`compiled` runs the student through torch.compile: a minute at first, faster then.

        `ranks` shares every batch among processes, whose checkpoint the first one writes.
        """
        self.ranks = ranks or Ranks()
        self.student = student
        self._forward = torch.compile(student) if compiled else student
        self._remembers = remembers_passes(student)
        self.recipe = recipe
        self.objective = objective
        self.seed = seed
        self.checkpoint = checkpoint
        self.epoch = 0  # finished epochs
        self.history = History()
        self._leave: Callable[[], bool] = lambda: False  # in the middle of an epoch?
        self.optimizer = recipe.make_optimizer(student)
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
        saved, slow = time.monotonic(), True  # the first epoch may be
        with held() as asked:  # a signal waits for a checkpoint
            while self.epoch < self.recipe.epochs:
                start = time.monotonic()
                # a long epoch is not finished first: what it began with is kept instead
                begun = self._copy() if slow and self.ranks.world == 1 else None
                self._leave = asked if begun else lambda: False
                if not self.one_epoch(pixels, labels):
                    self._write(begun)
                    break
                slow = time.monotonic() - start > _LONG_EPOCH
                self._end_of_epoch(start, test)
                on_epoch(self.history)
                stop = self.ranks.any(asked(), labels.device)
                if stop or time.monotonic() - saved > _CHECKPOINT_SECONDS:
                    self._write(self._state())
                    saved = time.monotonic()
                if stop:
                    break
        return self.history

    def _end_of_epoch(self, start: float, test: tuple[Tensor, Tensor]) -> None:
        """Count the epoch that began at `start`, and test where a test is due."""
        self.epoch += 1
        self.history.train_seconds += time.monotonic() - start
        self.history.just_tested = self.epoch in self.recipe.tests
        if self.history.just_tested:
            start = time.monotonic()
            self.history.tested.append((self.epoch, self.accuracy(*test)))
            self.history.test_seconds += time.monotonic() - start

    def accuracy(self, pixels: Tensor, labels: Tensor) -> float:
        """Top-1 in percent on pixels (N, 3, H, W) uint8 that are already cropped."""
        self.student.eval()
        mine, part = self.ranks.share(len(pixels))
        with training_in(self.recipe.precision):
            found = predicted(self.predict, pixels[mine])
        right = self.ranks.sum((found == labels[mine]).sum() * (part > 0))
        return 100 * int(right) / len(pixels)

    def one_epoch(self, pixels: Tensor, labels: Tensor) -> bool:
        """One pass over pixels (N, 3, H, W) uint8 in an order of this epoch's own.

        False: a signal has ended it between two batches.
        """
        recipe = self.recipe
        draw = self.objective.begin(self.seed, self.epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * recipe.schedule.factor(self.epoch)
        self.student.train()
        with (
            training_in(recipe.precision),
            masks_from(draw.initial_seed(), labels.device),
        ):
            total = self._batches(pixels, labels, draw)
        if total is None:
            return False
        if not total.isfinite():
            raise UserError(
                f"the student's loss is not finite in epoch {self.epoch}; lower "
                f"protocol.optimization.lr (now {recipe.lr})"
            )
        return True

    def _batches(self, pixels: Tensor, labels: Tensor, draw: Generator) -> Tensor | None:
        """Every batch of an epoch; the sum of their losses, None if a signal ended it."""
        device, size = labels.device, (pixels.shape[-2], pixels.shape[-1])
        total = torch.zeros((), device=device)
        for order in torch.randperm(len(pixels), generator=draw).split(self.recipe.batch_size):
            mine, part = self.ranks.share(len(order))
            rows, plan = to_device((order, self.objective.plan(len(order), size, draw)), device)
            # a set that the device does not hold is in a file, that is on the CPU
            batch = pixels[rows] if pixels.device == device else to_device(pixels[order], device)
            with part_of_batch(len(order), mine):
                loss = self.objective(self, batch, labels[rows], rows, plan, mine) * part
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.ranks.sum_gradients(self.student.parameters())
            self.optimizer.step()
            total += loss.detach()
            if self._leave():
                return None
        return self.ranks.sum(total)

    def predict(self, images: Tensor) -> Tensor:
        """Float32 logits (B, classes) of normalised images (B, 3, H, W)."""
        with autocast(self.recipe.precision, images.device):
            return self._forward(images).float()

    @torch.no_grad()
    def pass_unread(self, images: Tensor) -> None:
        """A pass whose logits nobody reads, left out where it would leave nothing behind."""
        if self._remembers:
            self.predict(images)

    def _state(self) -> dict[str, Tensor]:
        """Live tensors: weights and buffers, what the optimiser remembers, and the history."""
        state = {f"student.{k}": v for k, v in self.student.state_dict().items()}
        for name, parameter in self.student.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    state[f"optimizer.{key}.{name}"] = value
        tested = torch.tensor(self.history.tested, dtype=torch.float64).view(-1, 2)
        seconds = torch.tensor([self.history.train_seconds, self.history.test_seconds])
        return state | {"epoch": torch.tensor(self.epoch), "tested": tested, "seconds": seconds}

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def _write(self, state: dict[str, Tensor] | None) -> None:
        if self.ranks.first and state is not None:
            save_tensors(self.checkpoint, state, {})

    def _restore(self) -> None:
        fresh = {k: v.clone() for k, v in self.student.state_dict().items()}
        try:
            state = load_tensors(self.checkpoint)
            with reading(self.checkpoint, "it is of another training", CorruptFileError):
                self._take(state)
        except CorruptFileError as error:
            log.warning("%s; training this student from the start", error)
            self.student.load_state_dict(fresh)
            self.optimizer, self.epoch = self.recipe.make_optimizer(self.student), 0
            self.history = History()

    def _take(self, state: dict[str, Tensor]) -> None:
        self.epoch = int(state["epoch"])
        self.history.tested = [(int(e), top1) for e, top1 in state["tested"].tolist()]
        self.history.train_seconds, self.history.test_seconds = state["seconds"].tolist()
        self.student.load_state_dict(
            {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
        )
        parameters = dict(self.student.named_parameters())
        for full_name, value in state.items():
            if full_name.startswith("optimizer."):
                _, key, name = full_name.split(".", 2)
                step_on_cpu = key == "step" and not self.optimizer.defaults.get("fused")
                device = "cpu" if step_on_cpu else parameters[name].device
                self.optimizer.state[parameters[name]][key] = value.to(device)


def top1_after(
    net: nn.Module,
    recipe: Recipe,
    objective: Objective,
    pixels: Tensor,
    labels: Tensor,
    test: tuple[Tensor, Tensor],
    on_epoch: Callable[[History], None],
) -> float:
    """Top-1 in percent at the end of a training of which nothing is kept; tested only there."""
    recipe = replace(recipe, tests=(recipe.epochs,))
    with TemporaryDirectory() as folder:
        training = StudentTraining(net, recipe, objective, 0, Path(folder, "checkpoint"))
        return training.fit(pixels, labels, test, on_epoch).top1_last


def top1(found: Tensor, labels: Tensor) -> float:
    """Percent of the labels (N,) that were found."""
    return 100 * int((found == labels).sum()) / len(labels)


@torch.inference_mode()
def predicted(predict: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """The labels (N,) that a network in eval mode finds for pixels (N, 3, H, W) uint8, cropped."""
    found = []
    for attempt in _test_batches(pixels).attempts(pixels):
        with attempt as part:
            found.append(predict(normalise(part.float() / 255)).argmax(dim=1))
    return torch.cat(found)


def _test_batches(pixels: Tensor) -> Batches:
    """As many at once as memory takes; on a CPU a few, where more are no faster."""
    if pixels.device.type == "cpu":
        return Batches(_TEST_BATCH, "testing")
    each = _TEST_BYTES * pixels.shape[-2] * pixels.shape[-1]
    fits = int(min(_TEST_SHARE * free_bytes(pixels.device), _TEST_ROOM) / each)
    return Batches(min(max(fits, 1), _LARGEST_TEST), "testing")

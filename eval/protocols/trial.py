"""One training batch tried now: what a training takes where no finished one says so."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from eval.protocols.recipe import EvalProtocol, Recipe
from eval.students.registry import make_student
from mgd3.runtime.batching import peak_bytes, ran_out_of_memory
from mgd3.runtime.compute import training_in
from mgd3.storage.timing import WorkPace

_FEW = 8  # images of a trial on a CPU, whose rate larger batches share
GUESS = "a guess from one batch tried now"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One training batch, forward and backward."""

    seconds: float  # per image
    bytes: int  # at its peak, for the whole batch


def tried(student: str, size: int, num_classes: int, batch: int, device: torch.device) -> Step:
    """A batch of noise through a fresh student: no augmentation, no test, no teacher.

    Where memory runs out the batch is halved. Changes no stream of random numbers.
    """
    net = make_student(student, num_classes, size, seed=0).to(device)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=draw).to(device)
    labels = torch.arange(batch, device=device) % num_classes

    def step() -> None:
        F.cross_entropy(net(images), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    try:
        with (
            training_in("float32"),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            peak = peak_bytes(step)
            start = time.monotonic()
            step()
    except (RuntimeError, MemoryError) as error:
        if batch == 1 or not ran_out_of_memory(error):
            raise
        return tried(student, size, num_classes, batch // 2, device)
    return Step(seconds=(time.monotonic() - start) / batch, bytes=peak)


def few(batch: int, device: torch.device) -> int:
    """How many images to try, where `batch` are trained on at once."""
    return batch if device.type == "cuda" else min(batch, _FEW)


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """What a student's epochs on some images take here."""

    student: str
    protocol: EvalProtocol
    recipe: Recipe
    images: int
    num_classes: int
    cache: Path
    device: torch.device
    compiled: bool = False

    @property
    def pace(self) -> WorkPace:
        """How long an epoch took here, its share of tests and the teacher's answers included."""
        own = self.protocol
        kind = f"an image of {own.image_size} px, {own.name}, {self.recipe.precision}"
        how = ", compiled" if self.compiled else ""
        return WorkPace(
            self.cache, f"training {self.student} on {kind}{how}", self.device, each=self.images
        )

    def seconds(self, epochs: int) -> tuple[float, str]:
        """Of so many epochs; what that is judged by where none was timed here."""
        if (each := self.pace.seconds) is not None:
            return each * epochs, ""
        batch = few(min(self.recipe.batch_size, self.images), self.device)
        size = self.protocol.image_size
        step = tried(self.student, size, self.num_classes, batch, self.device)
        return step.seconds * self.images * epochs, GUESS

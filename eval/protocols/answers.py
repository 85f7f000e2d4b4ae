"""A teacher's answers, asked anew or stored, and the loss that students learn from them by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from eval.protocols.augmentation import SoftAugmentation
from eval.protocols.recipe import Learner, Plan, draw_plan
from mgd3.runtime.compute import autocast, to_device, training_in
from mgd3.runtime.seeding import stream
from mgd3.storage.cache import cached


class Answers:
    """A teacher's logits, asked anew for every batch."""

    def __init__(self, network: nn.Module, precision: str) -> None:
        self.network, self.precision = network, precision

    def begin(self, epoch: int) -> None:
        """An epoch begins."""

    @torch.no_grad()
    def __call__(self, images: Tensor, start: int = 0, whole: int | None = None) -> Tensor:
        """Float32 logits of images (B, 3, H, W): rows `start` on of a batch of `whole`."""
        with training_in(self.precision), autocast(self.precision, images.device):
            return self.network(images).float()


class StoredAnswers(Answers):
    """float16 logits kept by epoch and batch: the second student asks nothing (D4M's FKD).

    `folder` is named by everything that batches depend on but their order and size.
    """

    def __init__(self, network: nn.Module, precision: str, folder: Path) -> None:
        super().__init__(network, precision)
        self.folder = folder
        self._epoch = self._batch = self._size = 0

    def begin(self, epoch: int) -> None:
        """An epoch begins."""
        self._epoch, self._batch = epoch, 0

    def __call__(self, images: Tensor, start: int = 0, whole: int | None = None) -> Tensor:
        """Float32 logits of images (B, 3, H, W): rows `start` on of a batch of `whole`."""
        if self._batch == 0:  # the epoch's largest: its size decides what all batches hold
            self._size = whole or len(images)
        name = f"{self._batch:05d}-{start}-{len(images)}.safetensors"
        path = self.folder / f"{self._size}" / f"{self._epoch:04d}" / name
        self._batch += 1
        asked = super().__call__
        # one lock file for all batches of an epoch; processes that share a batch wait for nobody
        lock = f"rows-{start}"
        kept: dict[str, Tensor] = cached(
            path, {}, lambda: {"logits": asked(images).half()}, lock=lock
        )
        return to_device(kept["logits"], images.device).float()


@dataclass(frozen=True)
class SoftTargets:
    """KL divergence to the teacher's answers on augmented, mixed images."""

    answers: Answers
    augmentation: SoftAugmentation
    temperature: float
    double_norm_update: bool  # a second pass in train mode, as RDED's code does to log accuracy
    seed: int | None  # of the augmentations; None is the student's own
    weights: Tensor | None = None  # (N,)

    def begin(self, student_seed: int, epoch: int) -> Generator:
        """The student's stream of this epoch, or that of the stored labels."""
        self.answers.begin(epoch)
        if self.seed is not None:
            return stream("labels", self.seed, epoch)
        return stream("student", student_seed, epoch)

    def plan(self, count: int, size: tuple[int, int], generator: Generator) -> Plan:
        """What is random in a batch of `count` images of `size`."""
        return draw_plan(self.augmentation, count, size, generator)

    def __call__(
        self,
        learner: Learner,
        pixels: Tensor,
        target: Tensor,
        rows: Tensor,
        plan: Plan,
        mine: slice,
    ) -> Tensor:
        """The mean loss of the images `mine` of pixels (B, 3, H, W) uint8, whatever their class."""
        images = self.augmentation.apply(pixels, plan.draws)
        if plan.mix is not None:
            images = plan.mix.of(images)
        images = images[mine]
        logits_of_teacher = self.answers(images, mine.start, len(rows))
        if self.double_norm_update:
            learner.pass_unread(images)
        logits = learner.predict(images)
        loss = soft_loss(logits, logits_of_teacher, self.temperature)  # (B,)
        return loss.mean() if self.weights is None else (self.weights[rows[mine]] * loss).mean()


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits (B, classes) over the temperature, for each image (B,)."""
    target = (teacher / temperature).softmax(dim=1)
    log_student = (student / temperature).log_softmax(dim=1)
    return F.kl_div(log_student, target, reduction="none").sum(dim=1)

"""Soft-label protocols: RDED's online teacher, D4M's stored labels (constants live in YAML)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from eval.images import TestImages
from eval.protocols.augmentation import SoftAugmentation, cutmix
from eval.protocols.hard_label import every, interval
from eval.protocols.teachers import FullSetNetwork
from eval.protocols.training import Cosine, Recipe, Teacher, accuracy
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream
from mgd3.runtime.tensors import load_tensors, save_tensors, tensors_digest

Predict = Callable[[Tensor], Tensor]


class SoftLabel:
    """A student learns what a teacher says of each augmented, mixed batch (RDED's validation).

    Loss: KL(teacher || student) of both logits over the temperature, the mean over images, without
    the factor T^2 and without a hard label. AdamW; weight decay on weights alone.
    """

    def __init__(
        self,
        name: str,
        image_size: int,
        epochs: int,
        batch_by_ipc: Sequence[Sequence[int]],
        many_classes: Mapping[str, int],
        lr: float,
        lr_by_student: Mapping[str, float],
        weight_decay: float,
        cosine_periods: float,
        tests: Mapping[str, Any],
        patches: int,
        crop_scale: Sequence[float],
        flip: float,
        cutmix: float,
        temperature: float,
        labels: str,
        label_seed: int,
        double_norm_update: bool,
        precision: str,
        teacher: Mapping[str, Any],
        device: torch.device,
        cache: Path,
        workers: int,
        image_weights: str = "none",
    ) -> None:
        self.name = name
        self.image_size = checks.integer("protocol.image_size", image_size, minimum=4)
        self.stored_size = max(self.image_size, self.image_size // 7 * 8)  # 256 for 224
        self.test_resize = self.stored_size
        self.num_epochs = checks.integer("protocol.epochs", epochs, minimum=1)
        self.batch_by_ipc = [
            (
                checks.integer("protocol.batch_by_ipc", ipc, minimum=1),
                checks.integer("protocol.batch_by_ipc", size, minimum=1),
            )
            for ipc, size in batch_by_ipc
        ]
        self.many_classes = {
            key: checks.integer(f"protocol.many_classes.{key}", many_classes.get(key), minimum=1)
            for key in ("from_classes", "batch_factor")
        }
        self.lr = checks.number("protocol.lr", lr, minimum=0)
        self.lr_by_student = {
            s: checks.number(f"protocol.lr_by_student.{s}", v, minimum=0)
            for s, v in lr_by_student.items()
        }
        self.weight_decay = checks.number("protocol.weight_decay", weight_decay, minimum=0)
        self.cosine_periods = checks.number("protocol.cosine_periods", cosine_periods, minimum=1)
        self.test_every = checks.integer("protocol.tests.every", tests.get("every"), minimum=1)
        self.test_after = checks.number(
            "protocol.tests.after", tests.get("after"), minimum=0, maximum=1
        )
        self.cutmix = checks.number("protocol.cutmix", cutmix, minimum=0, maximum=1)
        self.temperature = checks.number("protocol.temperature", temperature, minimum=1e-6)
        self.labels = checks.choice("protocol.labels", labels, ["online", "stored"])
        self.label_seed = checks.integer("protocol.label_seed", label_seed, minimum=0)
        self.double_norm_update = checks.flag("protocol.double_norm_update", double_norm_update)
        self.precision = checks.choice("protocol.precision", precision, ["float32", "bfloat16"])
        self.image_weights = checks.choice(
            "protocol.image_weights", image_weights, ["none", "mass"]
        )
        self.augmentation = SoftAugmentation(
            size=self.image_size,
            patches=_strips(patches, self.stored_size),
            crop_scale=interval("protocol.crop_scale", crop_scale),
            flip=checks.number("protocol.flip", flip, minimum=0, maximum=1),
        )
        options = dict(teacher)
        self.minimum_top1 = checks.number(
            "protocol.teacher.minimum_top1", options.pop("minimum_top1", None), minimum=0
        )
        self.source = FullSetNetwork(
            "protocol.teacher", **options, device=device, cache=cache, workers=workers
        )
        self.cache = cache
        self.teacher: Teacher | None = None

    def recipe(self, ipc: int, num_classes: int, student: str) -> Recipe:
        """RDED's optimisation; its batch rule knows IPC 1, 10 and 50, others take the next lower.

        Raises `UserError` for an IPC below the table's first.
        """
        sizes = [size for least, size in sorted(self.batch_by_ipc) if least <= ipc]
        if not sizes:
            raise UserError(f"protocol.batch_by_ipc has no row for ipc={ipc}; add one, e.g. [1,10]")
        many = num_classes >= self.many_classes["from_classes"]
        size = sizes[-1] * (self.many_classes["batch_factor"] if many else 1)
        epochs = self.num_epochs
        return Recipe(
            epochs=epochs,
            batch_size=min(size, ipc * num_classes),
            optimizer="adamw",
            lr=self._rate(student),
            momentum=0.0,
            weight_decay=self.weight_decay,
            decay="weights",
            schedule=Cosine(period=self.cosine_periods * epochs),
            tests=tuple(
                n
                for n in every(self.test_every, epochs)
                if n == epochs or n - 1 > self.test_after * epochs
            ),
            precision=self.precision,
        )

    def _rate(self, student: str) -> float:
        """Of the longest family name that the student's begins with."""
        name = student.removeprefix("timm/")
        families = [f for f in self.lr_by_student if name.startswith(f)]
        return self.lr_by_student[max(families, key=len)] if families else self.lr

    def prepare(self, test: TestImages, device: torch.device) -> Teacher:
        """The teacher, trained now unless the cache has it.

        Raises `UserError` if it does not recognise the real test images, as one of another class
        order would not.
        """
        if self.teacher is not None:
            return self.teacher
        dataset = test.dataset
        network = self.source.network(dataset)
        top1 = accuracy(
            Answers(network, self.precision),
            *test.on(self.image_size, device, self.test_resize),
        )
        if top1 < self.minimum_top1:
            raise UserError(
                f"the teacher {self.source.student} is right on {top1:.1f} % of the real test "
                f"images of dataset={dataset.name}, less than protocol.teacher.minimum_top1="
                f"{self.minimum_top1:g}: wrong classes, wrong class order or too short a training"
            )
        self.teacher = Teacher(name=self.source.student, top1=top1, network=network)
        return self.teacher

    def objective(self, pixels: Tensor, weights: Tensor | None = None) -> SoftTargets:
        """The loss on pixels (N, 3, H, W) uint8; `weights` (N,) multiplies each image's."""
        assert self.teacher is not None, "prepare first"
        network = self.teacher.network
        answers = Answers(network, self.precision)
        if self.labels == "stored":
            options = [self.label_seed, self.cutmix, self.precision, asdict(self.augmentation)]
            inputs = tensors_digest(network.state_dict()) + tensors_digest({"pixels": pixels})
            made_from = hashlib.blake2s(f"{options}{inputs}".encode(), digest_size=8).hexdigest()
            answers = StoredAnswers(network, self.precision, self.cache / "labels" / made_from)
        return SoftTargets(
            answers=answers,
            augmentation=self.augmentation,
            cutmix_probability=self.cutmix,
            temperature=self.temperature,
            double_norm_update=self.double_norm_update,
            seed=self.label_seed if self.labels == "stored" else None,
            weights=weights,
        )


def _strips(patches: int, size: int) -> int:
    patches = checks.integer("protocol.patches", patches, minimum=1)
    if size % patches:
        raise UserError(f"protocol.patches={patches} does not divide the stored images' {size} px")
    return patches


class Answers:
    """A teacher's logits, asked anew for every batch."""

    def __init__(self, network: nn.Module, precision: str) -> None:
        self.network, self.precision = network, precision

    def begin(self, epoch: int) -> None:
        """An epoch begins."""

    @torch.no_grad()
    def __call__(self, images: Tensor, start: int = 0, whole: int | None = None) -> Tensor:
        """Float32 logits of images (B, 3, H, W): rows `start` on of a batch of `whole`."""
        enabled = self.precision == "bfloat16"
        with torch.autocast(images.device.type, torch.bfloat16, enabled=enabled):
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
        try:
            logits = load_tensors(path)["logits"].to(images.device)
        except FileNotFoundError:
            logits = super().__call__(images).half()
            save_tensors(path, {"logits": logits}, {})
        return logits.float()


@dataclass(frozen=True)
class SoftTargets:
    """KL divergence to the teacher's answers on augmented, mixed images."""

    answers: Answers
    augmentation: SoftAugmentation
    cutmix_probability: float
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

    def __call__(
        self,
        predict: Predict,
        pixels: Tensor,
        target: Tensor,
        rows: Tensor,
        draw: Generator,
        mine: slice,
    ) -> Tensor:
        """The mean loss of the images `mine` of pixels (B, 3, H, W) uint8, whatever their class."""
        images = self.augmentation(pixels, draw)
        if torch.rand((), generator=draw) < self.cutmix_probability:
            images, _, _ = cutmix(images, draw)
        images = images[mine]
        logits_of_teacher = self.answers(images, mine.start, len(rows))
        if self.double_norm_update:
            with torch.no_grad():
                predict(images)
        loss = soft_loss(predict(images), logits_of_teacher, self.temperature)  # (B,)
        return loss.mean() if self.weights is None else (self.weights[rows[mine]] * loss).mean()


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of logits (B, classes) over the temperature, for each image (B,)."""
    target = (teacher / temperature).softmax(dim=1)
    log_student = (student / temperature).log_softmax(dim=1)
    return F.kl_div(log_student, target, reduction="none").sum(dim=1)

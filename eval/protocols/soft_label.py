"""Soft-label protocols: RDED's online teacher, D4M's stored labels (constants live in YAML)."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from eval.images import TestImages
from eval.protocols.answers import Answers, SoftTargets, StoredAnswers
from eval.protocols.augmentation import SoftAugmentation
from eval.protocols.observers import origin, published_words
from eval.protocols.options import check_image_size, check_image_weights, options, pairs
from eval.protocols.recipe import Cosine, Recipe, Teacher
from eval.protocols.teachers import FullSetNetwork, FullSetOptions, Place
from eval.protocols.training import top1
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.stages import Stage
from mgd3.storage.tensors import tensors_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """AdamW under a cosine that ends at zero after one period of the epochs, or on its way."""

    lr: float
    lr_by_student: Mapping[str, float]  # by what the name begins with, after timm/
    weight_decay: float
    cosine_periods: float

    def __post_init__(self) -> None:
        checks.number("protocol.optimization.lr", self.lr, minimum=0)
        key = "protocol.optimization.lr_by_student"
        if not isinstance(self.lr_by_student, Mapping):
            raise UserError(f"{key}={self.lr_by_student!r} must be a mapping of rates by name")
        for student, lr in self.lr_by_student.items():
            checks.number(f"{key}.{student}", lr, minimum=0)
        checks.number("protocol.optimization.weight_decay", self.weight_decay, minimum=0)
        checks.number("protocol.optimization.cosine_periods", self.cosine_periods, minimum=1)

    def rate(self, student: str) -> float:
        """Of the longest family name that the student's begins with."""
        name = student.removeprefix("timm/")
        families = [f for f in self.lr_by_student if name.startswith(f)]
        return self.lr_by_student[max(families, key=len)] if families else self.lr


@dataclass(frozen=True, kw_only=True)
class ManyClasses:
    """From so many classes on, the batch is so many times as large."""

    from_classes: int
    batch_factor: int

    def __post_init__(self) -> None:
        checks.integer("protocol.many_classes.from_classes", self.from_classes, minimum=1)
        checks.integer("protocol.many_classes.batch_factor", self.batch_factor, minimum=1)


@dataclass(frozen=True, kw_only=True)
class Tests:
    """Tests every so many epochs from the first on, once a share is over; and at the end."""

    first: int  # finished epochs at the first test, were nothing left out
    every: int
    after: float  # share of the epochs

    def __post_init__(self) -> None:
        checks.integer("protocol.tests.first", self.first, minimum=1)
        checks.integer("protocol.tests.every", self.every, minimum=1)
        checks.number("protocol.tests.after", self.after, minimum=0, maximum=1)

    def of(self, epochs: int) -> tuple[int, ...]:
        """The finished epochs after which a student is tested."""
        due = range(self.first, epochs, self.every)
        return (*(n for n in due if n > self.after * epochs), epochs)


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How the teacher is asked: for every batch anew, or once for all students."""

    source: str
    seed: int  # of the augmentations where answers are stored
    temperature: float  # of teacher and student

    def __post_init__(self) -> None:
        checks.choice("protocol.answers.source", self.source, ["online", "stored"])
        checks.integer("protocol.answers.seed", self.seed, minimum=0)
        checks.number("protocol.answers.temperature", self.temperature, minimum=1e-6)


@dataclass(frozen=True, kw_only=True)
class TeacherOptions(FullSetOptions):
    """The network that gives the answers, and how good it must be."""

    minimum_top1: float  # percent of the real test images

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.number(f"{self.key}.minimum_top1", self.minimum_top1, minimum=0)


class SoftLabel:
    """A student learns what a teacher says of each augmented, mixed batch (RDED's validation).

    Loss: KL(teacher || student) of both logits over the temperature, the mean over images, without
    the factor T^2 and without a hard label. AdamW; weight decay on weights alone.
    """

    labels = "soft"

    def __init__(
        self,
        name: str,
        image_size: int,
        epochs: int,
        batch_by_ipc: Sequence[Sequence[int]],
        many_classes: Mapping[str, Any],
        optimization: Mapping[str, Any],
        tests: Mapping[str, Any],
        augmentation: Mapping[str, Any],
        answers: Mapping[str, Any],
        double_norm_update: bool,
        teacher: Mapping[str, Any],
        device: torch.device,
        cache: Path,
        workers: int,
        image_weights: str = "none",
        training_precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        self.name = name
        self.image_size = check_image_size(image_size)
        self.stored_size = max(self.image_size, self.image_size // 7 * 8)  # 256 for 224
        self.test_resize = self.stored_size
        self.num_epochs = checks.integer("protocol.epochs", epochs, minimum=1)
        self.batch_by_ipc = _batch_table(batch_by_ipc)
        self.many_classes = options(ManyClasses, "protocol.many_classes", many_classes)
        self.optimization = options(Optimization, "protocol.optimization", optimization)
        self.tests = options(Tests, "protocol.tests", tests)
        self.augmentation = self._augmentation(augmentation)
        self.augmented = self.augmentation.changes
        self.answers = options(AnswerOptions, "protocol.answers", answers)
        self.double_norm_update = checks.flag("protocol.double_norm_update", double_norm_update)
        self.image_weights = check_image_weights(image_weights)
        key = "protocol.teacher"
        self.teacher_options = options(TeacherOptions, key, teacher, key=key)
        self.place = Place(device, cache, workers, training_precision, compiled)
        self.source = FullSetNetwork(self.teacher_options, self.place)
        self.teacher: Teacher | None = None

    def _augmentation(self, values: Mapping[str, Any]) -> SoftAugmentation:
        key = "protocol.augmentation"
        made = options(SoftAugmentation, key, values, size=self.image_size)
        if self.stored_size % made.patches:
            raise UserError(
                f"{key}.patches={made.patches} does not divide the stored images' "
                f"{self.stored_size} px"
            )
        return made

    def recipe(self, ipc: int, num_classes: int, student: str) -> Recipe:
        """RDED's optimisation; its batch rule knows IPC 1, 10 and 50, others take the next lower.

        Raises `UserError` for an IPC below the table's first.
        """
        sizes = [size for least, size in sorted(self.batch_by_ipc) if least <= ipc]
        if not sizes:
            raise UserError(f"protocol.batch_by_ipc has no row for ipc={ipc}; add one, e.g. [1,10]")
        many = num_classes >= self.many_classes.from_classes
        size = sizes[-1] * (self.many_classes.batch_factor if many else 1)
        epochs, own = self.num_epochs, self.optimization
        return Recipe(
            epochs=epochs,
            batch_size=min(size, ipc * num_classes),
            optimizer="adamw",
            lr=own.rate(student),
            momentum=0.0,
            weight_decay=own.weight_decay,
            decay="weights",
            schedule=Cosine(period=own.cosine_periods * epochs),
            tests=self.tests.of(epochs),
            precision=self.place.training_precision,
        )

    def stages(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> list[Stage]:
        """Training the teacher, where neither a file nor the cache has it."""
        return [self.source.stage(dataset, inventory)]

    def prepare(self, test: TestImages, device: torch.device) -> Teacher:
        """The teacher, trained now unless the cache has it.

        Raises `UserError` if it does not recognise the real test images, as one of another class
        order would not.
        """
        if self.teacher is not None:
            return self.teacher
        dataset, own = test.dataset, self.teacher_options
        network = self.source.network(dataset)
        pixels, labels = test.on(self.image_size, device, self.test_resize)
        right = top1(self.source.answers(network, pixels, labels, dataset), labels)
        name, source = own.student, origin(own.weights)
        published = "" if own.weights is None else published_words(dataset, name)
        self.source.refuse_below(right, own.minimum_top1, dataset)
        log.info("teacher %s (%s): top-1 %.1f %%%s", name, source, right, published)
        self.teacher = Teacher(name=name, source=source, top1=right, network=network)
        return self.teacher

    def objective(self, pixels: Tensor, weights: Tensor | None = None) -> SoftTargets:
        """The loss on pixels (N, 3, H, W) uint8; `weights` (N,) multiplies each image's."""
        assert self.teacher is not None, "prepare first"
        stored = self.answers.source == "stored"
        network, precision = self.teacher.network, self.place.training_precision
        asked = cast(nn.Module, torch.compile(network)) if self.place.compiled else network
        folder = self._folder(network, pixels) if stored else None
        return SoftTargets(
            answers=StoredAnswers(asked, precision, folder)
            if folder
            else Answers(asked, precision),
            augmentation=self.augmentation,
            temperature=self.answers.temperature,
            double_norm_update=self.double_norm_update,
            seed=self.answers.seed if stored else None,
            weights=weights,
        )

    def _folder(self, network: nn.Module, pixels: Tensor) -> Path:
        """Of stored answers, named by the teacher, the pixels and how they are augmented."""
        precision = self.place.training_precision
        how = [self.answers.seed, precision, asdict(self.augmentation)]
        inputs = tensors_digest(network.state_dict()) + tensors_digest({"pixels": pixels})
        made_from = hashlib.blake2s(f"{how}{inputs}".encode(), digest_size=8).hexdigest()
        return self.place.cache / "labels" / made_from


def _batch_table(rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Rows [smallest ipc, batch size]."""
    key = "protocol.batch_by_ipc"
    return [
        (checks.integer(key, ipc, minimum=1), checks.integer(key, size, minimum=1))
        for ipc, size in pairs(key, rows, "smallest ipc, batch size", "[[1,10],[50,100]]")
    ]

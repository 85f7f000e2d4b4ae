"""The hard-label protocol of IDC, Minimax and MGD3 (protocols' constants live in its YAML)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from eval.images import TestImages
from eval.protocols.augmentation import Augmentation
from eval.protocols.options import (
    check_image_size,
    check_image_weights,
    options,
    pairs,
)
from eval.protocols.recipe import Learner, Plan, Recipe, Steps, Teacher, draw_plan
from mgd3.runtime import checks
from mgd3.runtime.compute import check_training_precision
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream

# The released table's last bound (IDC's argument.py). More images per class are the full set, which
# is trained by `--epochs 300`, 100 classes as any other number (MGD3, Minimax).
_MOST_DISTILLED = 500


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """SGD with momentum or AdamW; the rate is multiplied by gamma at each milestone."""

    optimizer: str  # sgd, or adamw with torch's betas 0.9 and 0.999, which has no momentum
    batch_size: int
    lr: float
    momentum: float
    weight_decay: float
    milestones: tuple[str, ...]  # shares of the epochs, such as 2/3
    gamma: float

    def __post_init__(self) -> None:
        checks.choice("protocol.optimization.optimizer", self.optimizer, ["sgd", "adamw"])
        checks.integer("protocol.optimization.batch_size", self.batch_size, minimum=1)
        checks.number("protocol.optimization.lr", self.lr, minimum=0)
        checks.number("protocol.optimization.momentum", self.momentum, minimum=0, maximum=1)
        checks.number("protocol.optimization.weight_decay", self.weight_decay, minimum=0)
        checks.number("protocol.optimization.gamma", self.gamma, minimum=0)
        _shares(self.milestones)

    def schedule(self, epochs: int) -> Steps:
        """The learning rate's course over so many epochs."""
        milestones = tuple(int(share * epochs) for share in _shares(self.milestones))
        return Steps(milestones=milestones, gamma=self.gamma)


@dataclass(frozen=True, kw_only=True)
class ManyClasses:
    """What datasets of more than `above` classes take instead; the batch is never smaller."""

    above: int
    lr: float
    weight_decay: float
    batch_size: int

    def __post_init__(self) -> None:
        checks.integer("protocol.many_classes.above", self.above, minimum=0)
        checks.number("protocol.many_classes.lr", self.lr, minimum=0)
        checks.number("protocol.many_classes.weight_decay", self.weight_decay, minimum=0)
        checks.integer("protocol.many_classes.batch_size", self.batch_size, minimum=0)


class HardLabel:
    """Trains a student on a distilled dataset with the classes as targets."""

    labels = "hard"

    def __init__(
        self,
        name: str,
        image_size: int,
        epochs_by_ipc: Sequence[Sequence[int | None]],
        shorten_100_classes: bool,
        tests_per_run: int,
        optimization: Mapping[str, Any],
        many_classes: Mapping[str, Any],
        augmentation: Mapping[str, Any],
        image_weights: str = "none",
        training_precision: str = "float32",
        epochs: int | None = None,
    ) -> None:
        """`epochs`, where given, stands in place of the whole table."""
        self.name = name
        self.image_size = check_image_size(image_size)
        self.stored_size = self.test_resize = self.image_size
        self.epochs_by_ipc = _epoch_table(epochs_by_ipc)
        self.shorten_100_classes = checks.flag("protocol.shorten_100_classes", shorten_100_classes)
        if epochs is not None:
            self.epochs_by_ipc = [(None, checks.integer("protocol.epochs", epochs, minimum=1))]
            self.shorten_100_classes = False
        self.tests_per_run = checks.integer("protocol.tests_per_run", tests_per_run, minimum=1)
        self.optimization = options(Optimization, "protocol.optimization", optimization)
        self.many_classes = options(ManyClasses, "protocol.many_classes", many_classes)
        self.augmentation = options(Augmentation, "protocol.augmentation", augmentation)
        self.augmented = self.augmentation.changes
        self.image_weights = check_image_weights(image_weights)
        self.precision = check_training_precision(training_precision)

    def epochs(self, ipc: int, num_classes: int) -> int:
        """Epochs for this many images per class; `UserError` if the table has no row for it."""
        for most, epochs in self.epochs_by_ipc:
            if most is None or ipc <= most:
                distilled = ipc <= _MOST_DISTILLED
                if self.shorten_100_classes and num_classes == 100 and distilled:
                    return checks.integer(
                        "epochs of 100 classes (protocol.shorten_100_classes)",
                        2 * epochs // 3 // 100 * 100,
                        minimum=1,
                    )
                return epochs
        raise UserError(
            f"protocol.epochs_by_ipc has no row for ipc={ipc}; add one, e.g. "
            "protocol.epochs_by_ipc=[[null,300]], or give protocol.epochs=300 for any ipc"
        )

    def recipe(self, ipc: int, num_classes: int, student: str) -> Recipe:
        """Everything that depends on the set's size; all students are trained alike."""
        epochs = self.epochs(ipc, num_classes)
        own, many = self.optimization, self.many_classes
        lr, weight_decay, batch_size = own.lr, own.weight_decay, own.batch_size
        if num_classes > many.above:
            lr, weight_decay = many.lr, many.weight_decay
            batch_size = max(batch_size, many.batch_size)
        return Recipe(
            epochs=epochs,
            batch_size=batch_size,
            optimizer=own.optimizer,
            lr=lr,
            momentum=own.momentum,
            weight_decay=weight_decay,
            decay="all",
            schedule=own.schedule(epochs),
            tests=every(max(1, epochs // self.tests_per_run), epochs),
            precision=self.precision,
        )

    def prepare(self, test: TestImages, device: torch.device) -> Teacher | None:
        """None: the classes are the targets."""
        return None

    def objective(self, pixels: Tensor, weights: Tensor | None = None) -> HardTargets:
        """The loss, whatever the pixels; `weights` (N,) multiplies each training image's."""
        return HardTargets(self.augmentation, weights)


@dataclass(frozen=True)
class HardTargets:
    """Cross-entropy on augmented, mixed images; CutMix's share weighs both labels."""

    augmentation: Augmentation
    weights: Tensor | None = None  # (N,), None is one for all

    def begin(self, student_seed: int, epoch: int) -> Generator:
        """The stream of (student_seed, epoch)."""
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
        """The mean loss of the images `mine` of pixels (B, 3, H, W) uint8 with labels (B,)."""
        images, mix = self.augmentation.apply(pixels, plan.draws), plan.mix
        if mix is not None:
            images = mix.of(images)
        logits = learner.predict(images[mine])
        weights = None if self.weights is None else self.weights[rows]
        loss = _cross_entropy(logits, target[mine], _part(weights, mine))
        if mix is not None and mix.share < 1:
            mixed = target[mix.permutation]
            weights = None if weights is None else weights[mix.permutation]
            other = _cross_entropy(logits, mixed[mine], _part(weights, mine))
            loss = mix.share * loss + (1 - mix.share) * other
        return loss


def every(interval: int, epochs: int) -> tuple[int, ...]:
    """Multiples of `interval` up to `epochs`, and `epochs` itself."""
    return tuple(n for n in range(1, epochs + 1) if n % interval == 0 or n == epochs)


def _part(weights: Tensor | None, mine: slice) -> Tensor | None:
    return None if weights is None else weights[mine]


def _cross_entropy(logits: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
    """The batch's mean, each row times its weight."""
    if weights is None:
        return F.cross_entropy(logits, target)
    return (weights * F.cross_entropy(logits, target, reduction="none")).mean()


def _epoch_table(rows: Sequence[Sequence[int | None]]) -> list[tuple[int | None, int]]:
    """Rows [largest ipc or null, epochs]."""
    key = "protocol.epochs_by_ipc"
    return [
        (
            None if most is None else checks.integer(key, most, minimum=1),
            checks.integer(key, epochs, minimum=1),
        )
        for most, epochs in pairs(key, rows, "largest ipc or null, epochs", "[[10,200],[null,100]]")
    ]


def _shares(values: object) -> list[Fraction]:
    """Exact, because 5/6 of 3000 epochs must not become 2499."""
    key, shares = "protocol.optimization.milestones", []
    if not isinstance(values, tuple):
        raise UserError(f"{key}={values!r} must be a list of fractions such as 2/3")
    for value in values:
        try:
            share = Fraction(str(value))
        except (ValueError, ZeroDivisionError) as error:
            raise UserError(f"{key}: {value!r} is not a fraction such as 2/3") from error
        checks.number(key, float(share), minimum=0, maximum=1)
        shares.append(share)
    return shares

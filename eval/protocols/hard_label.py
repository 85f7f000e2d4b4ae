"""The hard-label protocol of IDC, Minimax and MGD3 (protocols' constants live in its YAML)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from eval.images import TestImages
from eval.protocols.augmentation import Augmentation, cutmix
from eval.protocols.training import Recipe, Steps, Teacher
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream


class HardLabel:
    """Trains a student on a distilled dataset with the classes as targets."""

    def __init__(
        self,
        name: str,
        image_size: int,
        epochs_by_ipc: Sequence[Sequence[int | None]],
        shorten_100_classes: bool,
        tests_per_run: int,
        batch_size: int,
        lr: float,
        momentum: float,
        weight_decay: float,
        milestones: Sequence[str],
        gamma: float,
        crop_scale: Sequence[float],
        crop_ratio: Sequence[float],
        flip: float,
        jitter: float,
        lighting: float,
        cutmix: float,
        many_classes: dict[str, float],
        precision: str,
        image_weights: str = "none",
    ) -> None:
        self.name = name
        self.image_size = checks.integer("protocol.image_size", image_size, minimum=4)
        self.stored_size = self.test_resize = self.image_size
        self.epochs_by_ipc = _epoch_table(epochs_by_ipc)
        self.shorten_100_classes = checks.flag("protocol.shorten_100_classes", shorten_100_classes)
        self.tests_per_run = checks.integer("protocol.tests_per_run", tests_per_run, minimum=1)
        self.batch_size = checks.integer("protocol.batch_size", batch_size, minimum=1)
        self.lr = checks.number("protocol.lr", lr, minimum=0)
        self.momentum = checks.number("protocol.momentum", momentum, minimum=0, maximum=1)
        self.weight_decay = checks.number("protocol.weight_decay", weight_decay, minimum=0)
        self.milestones = [_share("protocol.milestones", m) for m in milestones]
        self.gamma = checks.number("protocol.gamma", gamma, minimum=0)
        self.cutmix = checks.number("protocol.cutmix", cutmix, minimum=0, maximum=1)
        self.many_classes = {
            key: checks.number(f"protocol.many_classes.{key}", many_classes.get(key), minimum=0)
            for key in ("above", "lr", "weight_decay", "batch_size")
        }
        self.precision = checks.choice("protocol.precision", precision, ["float32", "bfloat16"])
        self.image_weights = checks.choice(
            "protocol.image_weights", image_weights, ["none", "mass"]
        )
        self.augmentation = Augmentation(
            crop_scale=interval("protocol.crop_scale", crop_scale),
            crop_ratio=interval("protocol.crop_ratio", crop_ratio),
            flip=checks.number("protocol.flip", flip, minimum=0, maximum=1),
            jitter=checks.number("protocol.jitter", jitter, minimum=0),
            lighting=checks.number("protocol.lighting", lighting, minimum=0),
        )

    def epochs(self, ipc: int, num_classes: int) -> int:
        """Epochs for this many images per class; `UserError` if the table has no row for it."""
        for most, epochs in self.epochs_by_ipc:
            if most is None or ipc <= most:
                if self.shorten_100_classes and num_classes == 100:
                    return checks.integer(
                        "epochs of 100 classes (protocol.shorten_100_classes)",
                        2 * epochs // 3 // 100 * 100,
                        minimum=1,
                    )
                return epochs
        raise UserError(
            f"protocol.epochs_by_ipc has no row for ipc={ipc}; add one, e.g. [null, 300]"
        )

    def recipe(self, ipc: int, num_classes: int, student: str) -> Recipe:
        """Everything that depends on the set's size; all students are trained alike."""
        epochs = self.epochs(ipc, num_classes)
        lr, weight_decay, batch_size = self.lr, self.weight_decay, self.batch_size
        if num_classes > self.many_classes["above"]:
            lr, weight_decay = self.many_classes["lr"], self.many_classes["weight_decay"]
            batch_size = max(batch_size, int(self.many_classes["batch_size"]))
        return Recipe(
            epochs=epochs,
            batch_size=batch_size,
            optimizer="sgd",
            lr=lr,
            momentum=self.momentum,
            weight_decay=weight_decay,
            decay="all",
            schedule=self.schedule(epochs),
            tests=every(max(1, epochs // self.tests_per_run), epochs),
            precision=self.precision,
        )

    def schedule(self, epochs: int) -> Steps:
        """The learning rate's course over so many epochs."""
        milestones = tuple(int(m * epochs) for m in self.milestones)
        return Steps(milestones=milestones, gamma=self.gamma)

    def prepare(self, test: TestImages, device: torch.device) -> Teacher | None:
        """None: the classes are the targets."""
        return None

    def objective(self, pixels: Tensor, weights: Tensor | None = None) -> HardTargets:
        """The loss, whatever the pixels; `weights` (N,) multiplies each training image's."""
        return HardTargets(self.augmentation, self.cutmix, weights)


@dataclass(frozen=True)
class HardTargets:
    """Cross-entropy on augmented, mixed images; CutMix's share weighs both labels."""

    augmentation: Augmentation
    cutmix_probability: float  # of a batch; the mixing share is Beta(1, 1), that is uniform
    weights: Tensor | None = None  # (N,), None is one for all

    def begin(self, student_seed: int, epoch: int) -> Generator:
        """The stream of (student_seed, epoch)."""
        return stream("student", student_seed, epoch)

    def __call__(
        self,
        predict: Callable[[Tensor], Tensor],
        pixels: Tensor,
        target: Tensor,
        rows: Tensor,
        draw: Generator,
        mine: slice,
    ) -> Tensor:
        """The mean loss of the images `mine` of pixels (B, 3, H, W) uint8 with labels (B,)."""
        images, mixed, share = self.augmentation(pixels, draw), target, 1.0
        if torch.rand((), generator=draw) < self.cutmix_probability:
            images, permutation, share = cutmix(images, draw)
            mixed = target[permutation]
        logits = predict(images[mine])
        weights = None if self.weights is None else self.weights[rows]
        loss = share * _cross_entropy(logits, target[mine], _part(weights, mine))
        if share < 1:
            weights = None if weights is None else weights[permutation]
            loss = loss + (1 - share) * _cross_entropy(logits, mixed[mine], _part(weights, mine))
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
    table = []
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, list) or len(row) != 2:
            raise UserError(f"{key}: {row!r} must be a pair [largest ipc or null, epochs]")
        most = None if row[0] is None else checks.integer(key, row[0], minimum=1)
        table.append((most, checks.integer(key, row[1], minimum=1)))
    return table


def _share(key: str, value: object) -> Fraction:
    """Exact, because 5/6 of 3000 epochs must not become 2499."""
    try:
        share = Fraction(str(value))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{key}: {value!r} is not a fraction such as 2/3") from error
    checks.number(key, float(share), minimum=0, maximum=1)
    return share


def interval(key: str, value: Sequence[float]) -> tuple[float, float]:
    """[low, high] as a pair; `UserError` naming `key` if it is none."""
    low, high = (checks.number(key, v, minimum=0) for v in value)
    if low > high:
        raise UserError(f"{key}={list(value)} must be [low, high]")
    return low, high

"""The hard-label protocol of IDC, Minimax and MGD3 (protocols' constants live in its YAML)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from eval.augment import Augmentation
from eval.students import make_student
from eval.training import History, Recipe, StudentTraining
from mgd3 import checks
from mgd3.types import UserError


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
            crop_scale=_interval("protocol.crop_scale", crop_scale),
            crop_ratio=_interval("protocol.crop_ratio", crop_ratio),
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

    def recipe(self, ipc: int, num_classes: int) -> Recipe:
        """Everything that depends on the set's size."""
        epochs = self.epochs(ipc, num_classes)
        lr, weight_decay, batch_size = self.lr, self.weight_decay, self.batch_size
        if num_classes > self.many_classes["above"]:
            lr, weight_decay = self.many_classes["lr"], self.many_classes["weight_decay"]
            batch_size = max(batch_size, int(self.many_classes["batch_size"]))
        return Recipe(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            momentum=self.momentum,
            weight_decay=weight_decay,
            milestones=tuple(int(m * epochs) for m in self.milestones),
            gamma=self.gamma,
            cutmix_probability=self.cutmix,
            test_every=max(1, epochs // self.tests_per_run),
            precision=self.precision,
        )

    def evaluate(
        self,
        train: tuple[Tensor, Tensor],
        test: tuple[Tensor, Tensor],
        recipe: Recipe,
        student: str,
        student_seed: int,
        checkpoint: Path,
        on_epoch: Callable[[History], None],
        weights: Tensor | None = None,
    ) -> History:
        """Train `student` from scratch with `student_seed` on pixels and labels, and test it.

        `train` and `test` are (N, 3, H, W) uint8 and (N,), on the device to train on;
        `weights` (N,) multiplies each training image's loss.
        """
        pixels, labels = train
        num_classes = int(max(labels.max(), test[1].max())) + 1
        net = make_student(student, num_classes, self.image_size, student_seed).to(pixels.device)
        training = StudentTraining(
            net, recipe, self.augmentation, student_seed, checkpoint, weights
        )
        return training.fit(pixels, labels, test, on_epoch)


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


def _interval(key: str, value: Sequence[float]) -> tuple[float, float]:
    low, high = (checks.number(key, v, minimum=0) for v in value)
    if low > high:
        raise UserError(f"{key}={list(value)} must be [low, high]")
    return low, high

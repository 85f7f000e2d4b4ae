"""Networks that were trained elsewhere: RDED's observers, torchvision's, and files like theirs.

A file holds a state dict under torchvision's names, alone or under «model» as RDED's do. Its
classifier has a row for each class of the dataset, or for each of ImageNet's 1000, of which the
dataset's are taken. It does not say which class a row is of: real test images do.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mgd3.data.datasets import RealDataset
from mgd3.runtime.errors import UserError, first_line
from mgd3.storage.checkpoints import load_strictly

TORCHVISION = "torchvision"
# Top-1 in percent that RDED's README states of its ResNet-18 observers, by our datasets
PUBLISHED = {"imagenette": 90.0, "imagewoof": 75.0, "imageidc": 87.4, "imagenet100": 83.4}

IMAGENET = 1000  # classes
_PLAINLY = 25.0  # points that another order must gain on the classes that it moves


def torchvision_tensors(key: str, student: str, dataset: RealDataset) -> dict[str, Tensor]:
    """torchvision's first ImageNet weights of a student, fetched once by torch's hub; data alone.

    `key` names the configuration's place in messages. Raises `UserError` if they cannot be had,
    or do not know the dataset's classes.
    """
    from torchvision.models import get_model_weights

    if len(_imagenet_rows(dataset)) < len(dataset.classes):
        raise _of_other_classes(key, dataset)
    try:
        weights = get_model_weights(student.removesuffix("_bn")).IMAGENET1K_V1
        return weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (ValueError, AttributeError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{key}: torchvision's weights of {student} cannot be had ({first_line(error)})"
        ) from error


def load_observer(
    net: nn.Module, tensors: Mapping[str, Tensor], dataset: RealDataset, key: str, student: str
) -> None:
    """Fill a network of the dataset's classes, whose classifier takes the rows that are theirs.

    One of ImageNet's 1000 classes takes all rows, the dataset's first.

    Raises `UserError` for a network of another kind, class count or image size.
    """
    tensors = dict(tensors)
    _refuse_other_kinds(net, tensors, key, student)
    name = classifier_name(net)
    parts = [f"{name}.{part}" for part in ("weight", "bias")]
    count = len(tensors[parts[0]])
    rows = _rows(count, dataset, key)
    if len(net.state_dict()[parts[0]]) == IMAGENET:
        if count != IMAGENET:
            raise UserError(f"{key} tells {count} classes apart, not ImageNet's {IMAGENET}")
        rows = [*rows, *sorted(set(range(IMAGENET)).difference(rows))]
    tensors |= {part: tensors[part][rows] for part in parts if part in tensors}
    counters = {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")}
    load_strictly(net, counters | tensors, f"{key} ({student})")  # older files have no counters


def classifier_name(net: nn.Module) -> str:
    """The last linear layer, such as «fc»."""
    *_, last = (name for name, m in net.named_modules() if isinstance(m, nn.Linear))
    return last


def _refuse_other_kinds(
    net: nn.Module, tensors: Mapping[str, Tensor], key: str, student: str
) -> None:
    own, name = net.state_dict(), classifier_name(net)
    if any(k.startswith("layers.") for k in tensors) and "classifier.weight" in tensors:
        raise UserError(
            f"{key} is one of RDED's ConvNets, whose batch norm no student here has; take its "
            "ResNet-18 of the same classes"
        )
    if _has_statistics(tensors) and not _has_statistics(own):
        raise UserError(f"{key} has batch norm and {student} has none; set the student to one with")
    weight = tensors.get(f"{name}.weight")
    if weight is None or weight.ndim != 2:
        raise UserError(f"{key} is no {student}: it has no classifier «{name}.weight»")
    theirs, ours = tensors.get("conv1.weight"), own.get("conv1.weight")
    if theirs is not None and ours is not None and theirs.shape != ours.shape:
        raise UserError(
            f"{key} is of another image size: its first kernel is {_sides(theirs)}, that of "
            f"{student} at protocol.image_size is {_sides(ours)} (3x3 up to 128 px, 7x7 above)"
        )


def _has_statistics(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.endswith("running_mean") for name in tensors)


def _sides(kernel: Tensor) -> str:
    return "x".join(map(str, kernel.shape[2:]))


def _rows(count: int, dataset: RealDataset, key: str) -> list[int]:
    """Which of a classifier's rows are the dataset's classes, in label order."""
    classes, known = dataset.classes, _imagenet_rows(dataset)
    if count == IMAGENET and len(known) == len(classes):
        return known
    if count == len(classes):
        return list(range(count))
    if count == IMAGENET:
        raise _of_other_classes(key, dataset)
    raise UserError(
        f"{key} is of another class count: it tells {count} classes apart, dataset={dataset.name} "
        f"has {len(classes)}; allowed: {len(classes)}, or ImageNet's {IMAGENET}"
    )


def _imagenet_rows(dataset: RealDataset) -> list[int]:
    """ImageNet's index of each class that is one of its 1000."""
    return [c.imagenet_id for c in dataset.classes if c.imagenet_id is not None]


def _of_other_classes(key: str, dataset: RealDataset) -> UserError:
    return UserError(
        f"{key} knows ImageNet's classes only, and dataset={dataset.name} has others; set it to "
        "null to train one"
    )


def origin(weights: str | None) -> str:
    """Where a network comes from, for tables: no folders."""
    if weights is None:
        return "trained here"
    if weights == TORCHVISION:
        return "torchvision's IMAGENET1K_V1"
    name = Path(weights).name
    if re.fullmatch(r"imagenet-(nette|woof|10|100|1k)_\w+\.pth", name):  # as RDED calls its own
        return f"RDED's file {name}"
    return f"file {name}"


def published_words(dataset: RealDataset, student: str) -> str:
    """What RDED states of its observer of these classes; empty where it states nothing."""
    top1 = PUBLISHED.get(dataset.name) if student.startswith("resnet18") else None
    return f"; RDED publishes {top1:g} % of its ResNet-18" if top1 else ""


def refuse_other_orders(answers: Tensor, labels: Tensor, dataset: RealDataset, key: str) -> None:
    """`UserError` if a network's answers (N,) to real test images fit another order of the classes.

    Orders that are tried: sorted wnids, sorted names, and the one that fits best of all. An order
    fits better if it gains 25 points of accuracy on the images of the classes that it moves: two
    classes that are only hard to tell apart gain next to nothing by changing places.
    """
    count = len(dataset.classes)
    pairs = labels.cpu() * count + answers.cpu()
    table = torch.bincount(pairs, minlength=count**2).view(count, count).numpy()  # label, answer
    for what, rows in _orders(table, dataset).items():
        gained = _gain(table, rows)
        if gained is not None and gained > _PLAINLY:
            given = 100 * table.trace() / table.sum()
            other = 100 * table[np.arange(count), rows].sum() / table.sum()
            order = [dataset.classes[label].wnid for label in np.argsort(rows)]
            shown = ",".join(order[:3]) + (",…" if count > 3 else "")
            raise UserError(
                f"{key}: its rows are the classes of dataset={dataset.name} in another order, "
                f"{what} ({shown}): read so it is right on {other:.1f} % of the real test images, "
                f"in the dataset's order on {given:.1f} %; give dataset.classes in its order, or a "
                "file whose rows are in the dataset's"
            )


def _orders(table: np.ndarray, dataset: RealDataset) -> dict[str, np.ndarray]:
    """The row (classes,) that is each label's, by the name of the order."""
    from scipy.optimize import linear_sum_assignment

    keys = {
        "sorted wnids": [c.wnid for c in dataset.classes],
        "sorted names": [c.name for c in dataset.classes],
    }
    named = {what: np.argsort(np.argsort(values)) for what, values in keys.items()}
    return named | {"the one that fits best": linear_sum_assignment(table, maximize=True)[1]}


def _gain(table: np.ndarray, rows: np.ndarray) -> float | None:
    """Points of accuracy on images of the classes that are moved; None where there are none."""
    moved = np.flatnonzero(rows != np.arange(len(rows)))
    images = table[moved].sum()
    if not images:
        return None
    return 100 * (table[moved, rows[moved]].sum() - table[moved, moved].sum()) / images

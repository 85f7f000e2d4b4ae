"""DD-Ranking's scores (arXiv 2505.13300): what a set is worth apart from labels and augmentation.

All in fractions, so that LRS and ARS lie in [0, 1]. The published package works in percent and
exponentiates the raw difference: its scores do not lie there, nor do they compare with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import exp

from eval.results.cells import Cell, cells, in_order, places
from eval.results.layout import Layout, folded
from eval.results.rows import FULL, RANDOM, EvalResult
from eval.results.statistics import Metric


@dataclass(frozen=True, kw_only=True)
class Fairness:
    """One cell's scores in fractions; None where rows are missing, with what is missing."""

    cell: Cell
    hlr: float | None  # hard label recovery: how far below the full set, under hard labels
    ior: float | None  # improvement over random real images, under this cell's protocol
    lrs: float | None  # label-robust score
    ars: float | None  # augmentation-robust score
    missing: tuple[str, ...]  # «HLR, LRS: what is missing for them»


@dataclass(frozen=True)
class _Arm:
    """A cell and how its students were scored."""

    cell: Cell
    row: EvalResult  # any of the cell's, which share all that is asked of it here
    accuracy: float  # fraction

    @property
    def name(self) -> str:
        """The method's, without a configuration's id."""
        return self.row.name

    @property
    def hard(self) -> bool:
        """Are the targets the classes?"""
        return self.row.labels == "hard"

    @property
    def recipe(self) -> dict[str, object]:
        """What rows know of it."""
        row = self.row
        return {"epochs": row.epochs, "teacher": row.teacher, "test images": row.test_images}


def label_robust_score(hlr: float, ior: float, w: float = 0.5) -> float:
    """LRS of alpha = w IOR - (1 - w) HLR; 0.269 where the set equals both of its references."""
    return _normalised(w * ior - (1 - w) * hlr)


def augmentation_robust_score(aug: float, noaug: float, g: float = 0.5) -> float:
    """ARS of beta = g aug + (1 - g) noaug: improvements over random with augmentation, without."""
    return _normalised(g * aug + (1 - g) * noaug)


def fairness(
    rows: Sequence[EvalResult], w: float = 0.5, g: float = 0.5, metric: Metric = "top1_last"
) -> list[Fairness]:
    """Scores of every method but those of role random and full, by place.

    Accuracies are means over a cell's students; w and g lie in [0, 1]. Held against each other:

    * IOR, and each half of ARS: the method and the one of role random at the same dataset, IPC,
      protocol and student, with as many epochs, the same teacher and the same test images.
    * ARS: the method's cell with augmentation and the one, of the same dataset, IPC and student,
      whose protocol has none, but as many epochs, the same labels and the same teacher. The latter
      has a line of its own only if there is no former.
    * HLR: the method and the one of role full under hard labels with augmentation, same dataset,
      student and test images. Both under one protocol if such a pair exists, else the only one of
      each; IPC and epochs differ by nature. A cell of soft labels takes its method's hard-label
      cell of the same IPC.

    Rows name methods and protocols, not their options: a score is missing where two configurations
    of one name leave a choice. A single one with other options cannot be told from the right one.
    """
    arms = _arms(rows, metric)
    return [_scored(arms, ours, w, g) for ours in arms if _has_a_line(arms, ours)]


def fairness_layout(rows: Sequence[EvalResult], metric: Metric = "top1_last") -> Layout:
    """A line per cell: its scores in fractions, and what is missing for the others."""
    found = fairness(rows, metric=metric)
    columns = places([f.cell for f in found]) | {
        "method": [f.cell.method for f in found],
        "HLR": ["" if f.hlr is None else f"{f.hlr:+.3f}" for f in found],
        "IOR": ["" if f.ior is None else f"{f.ior:+.3f}" for f in found],
        "LRS": ["" if f.lrs is None else f"{f.lrs:.3f}" for f in found],
        "ARS": ["" if f.ars is None else f"{f.ars:.3f}" for f in found],
        "missing": ["; ".join(f.missing) for f in found],
    }
    return folded(f"fairness, {metric}", columns)


def _normalised(x: float) -> float:
    """[-1, 1] to [0, 1], both ends exactly."""
    return (exp(x) - exp(-1)) / (exp(1) - exp(-1))


def _arms(rows: Sequence[EvalResult], metric: Metric) -> list[_Arm]:
    return [
        _Arm(cell, cell.rows(rows)[0], getattr(cell, f"{metric}_mean") / 100)
        for cell in in_order(cells(rows))
    ]


def _has_a_line(arms: Sequence[_Arm], ours: _Arm) -> bool:
    """Neither a reference nor the second half of another line's ARS."""
    if ours.row.role in (RANDOM, FULL):
        return False
    return ours.row.augmented or not _halves(arms, ours)


def _scored(arms: Sequence[_Arm], ours: _Arm, w: float, g: float) -> Fairness:
    half = _other_half(arms, ours)
    needed = {
        "HLR, LRS": _recovery(arms, ours),
        "IOR, LRS, ARS": _improvement(arms, ours),
        "ARS": half if isinstance(half, str) else _improvement(arms, half),
    }
    hlr, ior, noaug = (None if isinstance(x, str) else x for x in needed.values())
    return Fairness(
        cell=ours.cell,
        hlr=hlr,
        ior=ior,
        lrs=None if hlr is None or ior is None else label_robust_score(hlr, ior, w),
        ars=None if ior is None or noaug is None else augmentation_robust_score(ior, noaug, g),
        missing=tuple(f"{scores}: {x}" for scores, x in needed.items() if isinstance(x, str)),
    )


def _improvement(arms: Sequence[_Arm], ours: _Arm) -> float | str:
    """Acc_syn,any - Acc_random,any, or what is missing for it."""
    found = [a for a in arms if (a.row.role, a.cell.place) == (RANDOM, ours.cell.place)]
    reference = _only(found, f"«{RANDOM}» under {ours.cell.protocol}")
    if isinstance(reference, str):
        return reference
    unlike = _unlike(ours, reference, ("epochs", "teacher", "test images"))
    return unlike or ours.accuracy - reference.accuracy


def _recovery(arms: Sequence[_Arm], ours: _Arm) -> float | str:
    """Acc_real,hard - Acc_syn,hard, or what is missing for it."""
    tested = ours.cell.dataset, ours.cell.test_data, ours.cell.student
    full = [
        a
        for a in arms
        if (a.cell.dataset, a.cell.test_data, a.cell.student) == tested
        and (a.row.role == FULL and a.hard and a.row.augmented)
    ]
    if not full:
        return f"«{FULL}» under a hard-label protocol"
    mine = [ours]
    if not (ours.hard and ours.row.augmented):
        mine = [a for a in _siblings(arms, ours) if a.hard and a.row.augmented]
        if not mine:
            return f"{ours.name} under a hard-label protocol"
        if isinstance(twins := _alone(arms, ours), str):
            return twins
    pairs = list(product(full, mine))
    pairs = [(f, m) for f, m in pairs if f.cell.protocol == m.cell.protocol] or pairs
    if len(pairs) > 1:
        return (
            f"one hard-label cell each of «{FULL}» and {ours.name} "
            f"(there are {len(full)} and {len(mine)})"
        )
    reference, syn = pairs[0]
    return _unlike(syn, reference, ("test images",)) or reference.accuracy - syn.accuracy


def _other_half(arms: Sequence[_Arm], ours: _Arm) -> _Arm | str:
    """The method without augmentation (with, for a cell without), or what is missing for it."""
    found = _halves(arms, ours)
    half = _only(
        found,
        f"{ours.name} {'without' if ours.row.augmented else 'with'} augmentation, "
        f"{'hard' if ours.hard else 'soft'} labels, {ours.recipe['epochs']} epochs",
    )
    own = _alone(arms, ours)
    return own if isinstance(own, str) and found else half


def _halves(arms: Sequence[_Arm], ours: _Arm) -> list[_Arm]:
    """The method's cells that differ in augmentation, as far as rows tell in nothing else."""
    return [
        a
        for a in _siblings(arms, ours)
        if a.row.augmented != ours.row.augmented and (a.hard, a.recipe) == (ours.hard, ours.recipe)
    ]


def _siblings(arms: Sequence[_Arm], ours: _Arm) -> list[_Arm]:
    """The method's cells of this dataset, IPC, student and test images, under any protocol."""

    def group(arm: _Arm) -> tuple[object, ...]:
        cell = arm.cell
        return arm.name, cell.dataset, cell.ipc, cell.student, cell.test_data

    return [a for a in arms if group(a) == group(ours)]


def _alone(arms: Sequence[_Arm], ours: _Arm) -> _Arm | str:
    """`ours`, unless its name has several configurations, whose cells elsewhere are not told."""
    found = [a for a in _siblings(arms, ours) if a.cell.protocol == ours.cell.protocol]
    return _only(found, f"{ours.name} under {ours.cell.protocol}")


def _only(found: Sequence[_Arm], what: str) -> _Arm | str:
    if len(found) > 1:
        return f"one configuration of {what} (there are {len(found)})"
    return found[0] if found else what


def _unlike(ours: _Arm, reference: _Arm, keys: Sequence[str]) -> str:
    """Which of `keys` the two were not scored alike in; empty if in none."""
    unlike = [
        f"{k}: {reference.recipe[k]}, not {ours.recipe[k]}"
        for k in keys
        if ours.recipe[k] != reference.recipe[k]
    ]
    what = f"«{reference.name}» under {reference.cell.protocol} scored alike"
    return f"{what} (its {'; '.join(unlike)})" if unlike else ""

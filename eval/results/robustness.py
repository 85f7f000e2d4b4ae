"""DD-Ranking's scores (arXiv 2505.13300): what a set is worth apart from labels and augmentation.

All in fractions, so that LRS and ARS lie in [0, 1]. The published package works in percent and
exponentiates the raw difference: its scores do not lie there, nor do they compare with these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import exp

from eval.results.rows import EvalResult
from eval.results.statistics import Metric, folded, in_order, place_of, places
from eval.results.tables import Cell, Layout, cells

RANDOM, FULL = "random", "full"  # the methods that others are held against
NOAUG = "_noaug"  # ends the name of a protocol that is another's without augmentation
SOFT = "soft_label"  # begins the name of a protocol whose targets are a teacher's answers


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
    name: str  # the method's, without a configuration's id
    accuracy: float  # fraction
    recipe: dict[str, object]  # what rows know of it

    @property
    def hard(self) -> bool:
        """Are the targets the classes? Not all such protocols say so in their name."""
        return self.recipe["teacher"] is None and not self.cell.protocol.startswith(SOFT)

    @property
    def augmented(self) -> bool:
        """By the protocol's name."""
        return not self.cell.protocol.endswith(NOAUG)


def label_robust_score(hlr: float, ior: float, w: float = 0.5) -> float:
    """LRS of alpha = w IOR - (1 - w) HLR; 0.269 where the set equals both of its references."""
    return _normalised(w * ior - (1 - w) * hlr)


def augmentation_robust_score(aug: float, noaug: float, g: float = 0.5) -> float:
    """ARS of beta = g aug + (1 - g) noaug: improvements over random with augmentation, without."""
    return _normalised(g * aug + (1 - g) * noaug)


def fairness(
    rows: Sequence[EvalResult], w: float = 0.5, g: float = 0.5, metric: Metric = "top1_last"
) -> list[Fairness]:
    """Scores of every method but «random» and «full», by dataset, IPC, protocol and student.

    Accuracies are means over a cell's students; w and g lie in [0, 1]. Held against each other:

    * IOR, and each half of ARS: the method and «random» of the same dataset, IPC, protocol and
      student, with as many epochs and test images and the same teacher.
    * ARS: the method's cell and the one, of the same dataset, IPC and student, whose protocol ends
      in «_noaug» and has as many epochs and the same teacher (of several, the one named like the
      first). The latter has a line of its own only if there is no former.
    * HLR: the method and «full» under hard labels with augmentation, same dataset, student and
      number of test images. Both under one protocol if such a pair exists, else the only one of
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
    row = {(r.cell_id, r.student): r for r in rows}  # any: a cell's rows share the recipe
    return [
        _Arm(
            cell=cell,
            name=r.method,
            accuracy=getattr(cell, f"{metric}_mean") / 100,
            recipe={"epochs": r.epochs, "teacher": r.teacher, "test images": r.test_images},
        )
        for cell in in_order(cells(rows))
        for r in [row[cell.cell_id, cell.student]]
    ]


def _has_a_line(arms: Sequence[_Arm], ours: _Arm) -> bool:
    """Neither a reference nor the second half of another line's ARS."""
    return ours.name not in (RANDOM, FULL) and (ours.augmented or not _halves(arms, ours))


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
    found = [a for a in arms if (a.name, place_of(a.cell)) == (RANDOM, place_of(ours.cell))]
    reference = _only(found, f"«{RANDOM}» under {ours.cell.protocol}")
    if isinstance(reference, str):
        return reference
    unlike = _unlike(ours, reference, ("epochs", "teacher", "test images"))
    return unlike or ours.accuracy - reference.accuracy


def _recovery(arms: Sequence[_Arm], ours: _Arm) -> float | str:
    """Acc_real,hard - Acc_syn,hard, or what is missing for it."""
    place = (ours.cell.dataset, ours.cell.student)
    full = [a for a in arms if (a.name, a.cell.dataset, a.cell.student) == (FULL, *place)]
    full = [a for a in full if a.hard and a.augmented]
    if not full:
        return f"«{FULL}» under a hard-label protocol"
    mine = [ours]
    if not (ours.hard and ours.augmented):
        mine = [a for a in _siblings(arms, ours) if a.hard and a.augmented]
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
    named = [a for a in found if a.cell.protocol == ours.cell.protocol + NOAUG]
    half = _only(
        named or found,
        f"{ours.name} {'without' if ours.augmented else 'with'} augmentation, "
        f"{'hard' if ours.hard else 'soft'} labels, {ours.recipe['epochs']} epochs",
    )
    own = _alone(arms, ours)
    return own if isinstance(own, str) and found else half


def _halves(arms: Sequence[_Arm], ours: _Arm) -> list[_Arm]:
    """The method's cells that differ in augmentation, as far as rows tell in nothing else."""
    return [
        a
        for a in _siblings(arms, ours)
        if a.augmented != ours.augmented and (a.hard, a.recipe) == (ours.hard, ours.recipe)
    ]


def _siblings(arms: Sequence[_Arm], ours: _Arm) -> list[_Arm]:
    """The method's cells of this dataset, IPC and student, under any protocol."""
    key = (ours.name, ours.cell.dataset, ours.cell.ipc, ours.cell.student)
    return [a for a in arms if (a.name, a.cell.dataset, a.cell.ipc, a.cell.student) == key]


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

"""What repeated runs say: variance components of a cell, differences between two cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, pstdev, stdev, variance
from typing import Literal

from scipy.stats import t as student_t

from eval.results.rows import EvalResult, order_of
from eval.results.tables import Cell, Difference, Layout, cells, interval

Metric = Literal["top1_last", "top1_best"]
Scores = Mapping[int, Sequence[float]]  # students' scores by distillation seed, that is by set

_SHARED = ("dataset", "ipc", "protocol", "student")  # to the title where all lines agree


@dataclass(frozen=True, kw_only=True)
class Components:
    """One cell's mean and its spread, in the scores' unit; None is not estimable.

    y_ij = mu + d_i + s_ij: the distillation seed i draws a set, the student seed j a student of it.
    """

    mean: float  # of all students, as the papers print
    std_population: float  # of all students, as the papers' np.std
    std_sample: float | None  # the same with n - 1
    distillation_std: float | None  # of d_i; needs two sets, and two students of one
    student_std: float | None  # of s_ij; needs two students of one set
    clipped: bool  # the estimate of d's variance was negative and stands as 0
    low: float | None  # 95 % t-interval of the mean over sets; needs two
    high: float | None
    n: int  # students
    sets: int


@dataclass(frozen=True, kw_only=True)
class Comparison(Difference):
    """A difference of two cells; unpaired, n counts the sets of both."""

    paired: bool  # on shared distillation seeds; else Welch's interval of two samples of sets


def scores_by_set(
    rows: Sequence[EvalResult], cell: Cell, metric: Metric = "top1_last"
) -> dict[int, list[float]]:
    """One cell's scores in percent, by distillation seed in ascending order."""
    found: dict[int, list[float]] = defaultdict(list)
    for r in sorted(rows, key=lambda r: (r.distill_seed, r.student_seed)):
        if (r.cell_id, r.student) == (cell.cell_id, cell.student):
            found[r.distill_seed].append(getattr(r, metric))
    return dict(found)


def components(scores: Scores) -> Components:
    """Mean, deviations and variance components: one-way random effects, sets of any sizes.

    ANOVA estimators (Searle, Casella and McCulloch, Variance Components, 1992, chapter 3).
    A student seed means the same initial weights in every set. A variance v that its students have
    in common lowers the distillation component by v / (students per set). The interval's centre
    is the mean of the sets' means: `mean`, if all sets have equally many students.
    """
    values = [value for group in scores.values() for value in group]
    n, sets, mean = len(values), len(scores), fmean(values)
    means = [fmean(group) for group in scores.values()]
    between = within = None
    if n > sets:
        squares = sum((v - m) ** 2 for m, g in zip(means, scores.values(), strict=True) for v in g)
        within = squares / (n - sets)
    if within is not None and sets > 1:
        sizes = [len(group) for group in scores.values()]
        spread = sum(size * (m - mean) ** 2 for size, m in zip(sizes, means, strict=True))
        typical = (n - sum(size**2 for size in sizes) / n) / (sets - 1)  # n / sets if balanced
        between = (spread / (sets - 1) - within) / typical
    low, high = interval(means)[1:] if sets > 1 else (None, None)
    return Components(
        mean=mean,
        std_population=pstdev(values),
        std_sample=stdev(values) if n > 1 else None,
        distillation_std=None if between is None else max(between, 0.0) ** 0.5,
        student_std=None if within is None else within**0.5,
        clipped=between is not None and between < 0,
        low=low,
        high=high,
        n=n,
        sets=sets,
    )


def compare(ours: Scores, theirs: Scores) -> Comparison | None:
    """Ours minus theirs with a 95 % interval, each set's students averaged first.

    Paired on the distillation seeds that both have; under two of them, Welch's interval of all
    sets (Biometrika 34, 1947). None where a side has one set, or no set differs from another.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) > 1:
        mean, low, high = interval([fmean(ours[seed]) - fmean(theirs[seed]) for seed in shared])
        return Comparison(mean=mean, low=low, high=high, n=len(shared), paired=True)
    sides = [[fmean(group) for group in side.values()] for side in (ours, theirs)]
    if min(map(len, sides)) < 2:
        return None
    errors = [variance(side) / len(side) for side in sides]  # squared, of each side's mean
    if not sum(errors):
        return None
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(side) - 1) for error, side in zip(errors, sides, strict=True)
    )
    half = student_t.ppf(0.975, freedom) * sum(errors) ** 0.5
    mean, n = fmean(sides[0]) - fmean(sides[1]), sum(map(len, sides))
    return Comparison(mean=mean, low=mean - half, high=mean + half, n=n, paired=False)


def components_layout(rows: Sequence[EvalResult], metric: Metric = "top1_last") -> Layout:
    """A line per cell: mean, deviations, variance components, in percent; empty: not estimable."""
    found = in_order(cells(rows))
    parts = [components(scores_by_set(rows, cell, metric)) for cell in found]
    columns = places(found) | {
        "method": [c.method for c in found],
        "mean": [_number(p.mean) for p in parts],
        "95 % interval": [
            "" if p.low is None else f"[{p.low:.1f}, {_number(p.high)}]" for p in parts
        ],
        "std (n)": [_number(p.std_population) for p in parts],
        "std (n-1)": [_number(p.std_sample) for p in parts],
        "distillation std": [_number(p.distillation_std) + "*" * p.clipped for p in parts],
        "student std": [_number(p.student_std) for p in parts],
        "n": [str(p.n) for p in parts],
        "sets": [str(p.sets) for p in parts],
    }
    return folded(metric, columns)


def differences_layout(rows: Sequence[EvalResult], metric: Metric = "top1_last") -> Layout:
    """A line for every two methods of one dataset, IPC, protocol and student, in percent."""
    pairs = [
        (a, b) for a, b in combinations(in_order(cells(rows)), 2) if place_of(a) == place_of(b)
    ]
    found = [compare(*(scores_by_set(rows, cell, metric) for cell in pair)) for pair in pairs]
    columns = places([a for a, _ in pairs]) | {
        "method": [a.method for a, _ in pairs],
        "minus": [b.method for _, b in pairs],
        "difference": [str(d) if d else "" for d in found],
        "n": [str(d.n) if d else "" for d in found],
        "kind": [("paired" if d.paired else "Welch") if d else "not computable" for d in found],
    }
    return folded(f"differences of {metric}", columns)


def place_of(cell: Cell) -> tuple[str, int, str, str]:
    """Where a cell's accuracy compares: dataset, IPC, protocol, student."""
    return cell.dataset, cell.ipc, cell.protocol, cell.student


def in_order(found: Sequence[Cell]) -> list[Cell]:
    """By dataset, IPC, protocol, then students and methods as they appeared."""
    students = order_of(c.student for c in found)
    return sorted(found, key=lambda c: (c.dataset, c.ipc, c.protocol, students.index(c.student)))


def places(found: Sequence[Cell]) -> dict[str, list[str]]:
    """The columns that say where each line's cell stands."""
    return {name: [str(getattr(c, name)) for c in found] for name in _SHARED}


def folded(what: str, columns: Mapping[str, list[str]]) -> Layout:
    """Columns as a table; a place that all lines share moves to the title."""
    shared = {k: columns[k][0] for k in _SHARED if len(set(columns[k])) == 1}
    kept = {k: values for k, values in columns.items() if k not in shared}
    title = ", ".join([what, *(f"ipc {v}" if k == "ipc" else v for k, v in shared.items())])
    lines = [list(line) for line in zip(*kept.values(), strict=True)]
    return Layout(title=title, headers=list(kept), lines=lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"

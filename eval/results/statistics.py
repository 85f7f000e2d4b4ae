"""What repeated runs say: variance components of a cell, differences between two cells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, pstdev, stdev, variance
from typing import Literal

from eval.results.cells import cells, in_order, places
from eval.results.layout import NONE, Layout, folded
from eval.results.rows import EvalResult

Metric = Literal["top1_last", "top1_best"]
# Students' scores by distillation seed, that is by set; None: the set of a method without seeds.
Scores = Mapping[int | None, Sequence[float]]

_NO_SPREAD = 1e-9  # points; what rounding leaves of an interval without any


@dataclass(frozen=True, kw_only=True)
class Components:
    """One cell's mean and its spread, in the scores' unit; None is not estimable.

    y_ij = mu + d_i + s_ij: the distillation seed i draws a set, the student seed j a student of it.
    """

    mean: float  # of all students, as the papers print
    std_population: float | None  # of all students, as the papers' np.std; None: of one
    std_sample: float | None  # the same with n - 1
    distillation_std: float | None  # of d_i; needs two sets, and two students of one
    student_std: float | None  # of s_ij; needs two students of one set
    clipped: bool  # the estimate of d's variance was negative and stands as 0
    low: float | None  # 95 % t-interval of the mean over sets; needs two
    high: float | None
    n: int  # students
    sets: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One cell minus another, with a 95 % t-interval; None: too few values for one."""

    mean: float
    low: float | None
    high: float | None
    n: int  # pairs; unpaired, the units of both sides
    paired: bool  # on shared distillation seeds; else Welch's interval of two samples

    def __str__(self) -> str:
        return self.text()

    def text(self, places: int = 1) -> str:
        """The difference and its interval, or a dash where there is none."""
        ends = [f"{end:+.{places}f}" for end in (self.low, self.high) if end is not None]
        return f"{self.mean:+.{places}f} [{', '.join(ends) or NONE}]"


def scores_by_set(
    rows: Sequence[EvalResult], metric: Metric = "top1_last"
) -> dict[int | None, list[float]]:
    """One cell's scores in percent, by distillation seed in ascending order."""
    found: dict[int | None, list[float]] = defaultdict(list)
    for r in sorted(rows, key=lambda r: (seed_order(r.distill_seed), r.student_seed)):
        found[r.distill_seed].append(getattr(r, metric))
    return dict(found)


def seed_order(seed: int | None) -> int:
    """Seeds by size, behind none at all."""
    return -1 if seed is None else seed


def units(scores: Scores) -> list[float]:
    """What varies independently: sets, as their students' means; without seeds, the students."""
    return [
        value
        for seed, group in scores.items()
        for value in (group if seed is None else [fmean(group)])
    ]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent values and its 95 % t-interval; a point for a single value."""
    mean, n = fmean(values), len(values)
    half = _t(n - 1) * stdev(values) / n**0.5 if n > 1 else 0.0
    return mean, mean - half, mean + half


def components(scores: Scores) -> Components:
    """Mean, deviations and variance components: one-way random effects, sets of any sizes.

    ANOVA estimators (Searle, Casella and McCulloch, Variance Components, 1992, chapter 3).
    A student seed means the same initial weights in every set. A variance v that its students have
    in common lowers the distillation component by v / (students per set). The interval's centre
    is the mean of the sets' means: `mean`, if all sets have equally many students.
    """
    values = [value for group in scores.values() for value in group]
    between, within = _variances(scores)
    means = [fmean(group) for group in scores.values()]
    low, high = interval(means)[1:] if len(means) > 1 else (None, None)
    return Components(
        mean=fmean(values),
        std_population=pstdev(values) if len(values) > 1 else None,
        std_sample=stdev(values) if len(values) > 1 else None,
        distillation_std=None if between is None else max(between, 0.0) ** 0.5,
        student_std=None if within is None else within**0.5,
        clipped=between is not None and between < 0,
        low=low,
        high=high,
        n=len(values),
        sets=len(scores),
    )


def paired(ours: Scores, theirs: Scores) -> Difference | None:
    """Ours minus theirs on the distillation seeds that both have, each set's students averaged.

    None without such a seed; without an interval for a single one, and for pairs that all differ
    by the same, whose spread two seeds can hide.
    """
    shared = sorted(s for s in ours.keys() & theirs.keys() if s is not None)
    if not shared:
        return None
    mean, *ends = interval([fmean(ours[seed]) - fmean(theirs[seed]) for seed in shared])
    low, high = ends if ends[1] - ends[0] > _NO_SPREAD else (None, None)
    return Difference(mean=mean, low=low, high=high, n=len(shared), paired=True)


def seeds_for(difference: Difference, within: float) -> int | None:
    """How many paired seeds an interval of ± `within` would take, were they to differ as these do.

    None where the difference is not paired or has no interval.
    """
    if not difference.paired or difference.low is None or difference.high is None:
        return None
    n = difference.n
    spread = (difference.high - difference.low) / 2 * n**0.5 / _t(n - 1)
    low, high = 1, 2  # too few, enough
    while _t(high - 1) * spread / high**0.5 > within:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = _t(middle - 1) * spread / middle**0.5 <= within
        low, high = (low, middle) if enough else (middle, high)
    return high


def compare(ours: Scores, theirs: Scores) -> Difference:
    """Ours minus theirs: `paired`, or else Welch's interval of all units (Biometrika 34, 1947).

    Without an interval where a side has one unit, or no unit differs from another.
    """
    pairs = paired(ours, theirs)
    if pairs and pairs.n > 1:
        return pairs
    sides = [units(side) for side in (ours, theirs)]
    mean, n = fmean(sides[0]) - fmean(sides[1]), sum(map(len, sides))
    alone = pairs or Difference(mean=mean, low=None, high=None, n=n, paired=False)
    if min(map(len, sides)) < 2:
        return alone
    errors = [variance(side) / len(side) for side in sides]  # squared, of each side's mean
    if not sum(errors):
        return alone
    freedom = sum(errors) ** 2 / sum(
        error**2 / (len(side) - 1) for error, side in zip(errors, sides, strict=True)
    )
    half = _t(freedom) * sum(errors) ** 0.5
    return Difference(mean=mean, low=mean - half, high=mean + half, n=n, paired=False)


def components_layout(rows: Sequence[EvalResult], metric: Metric = "top1_last") -> Layout:
    """A line per cell: mean, deviations, variance components, in percent; –: not estimable."""
    found = in_order(cells(rows))
    parts = [components(scores_by_set(cell.rows(rows), metric)) for cell in found]
    columns = places(found) | {
        "method": [c.method for c in found],
        "mean": [_number(p.mean) for p in parts],
        "95 % interval": [
            NONE if p.low is None else f"[{p.low:.1f}, {_number(p.high)}]" for p in parts
        ],
        "std (n)": [_number(p.std_population) for p in parts],
        "std (n-1)": [_number(p.std_sample) for p in parts],
        "distillation std": [_number(p.distillation_std) + "*" * p.clipped for p in parts],
        "student std": [_number(p.student_std) for p in parts],
        "n": [str(p.n) for p in parts],
        "sets": [str(p.sets) for p in parts],
    }
    return folded(metric, columns)


def differences_layout(
    rows: Sequence[EvalResult], metric: Metric = "top1_last", within: float = 1.0
) -> Layout:
    """A line for every two methods of one dataset, IPC, protocol and student, in percent.

    The last column is `seeds_for` an interval of ± `within` points.
    """
    pairs = [(a, b) for a, b in combinations(in_order(cells(rows)), 2) if a.place == b.place]
    found = [compare(*(scores_by_set(c.rows(rows), metric) for c in pair)) for pair in pairs]
    columns = places([a for a, _ in pairs]) | {
        "method": [a.method for a, _ in pairs],
        "minus": [b.method for _, b in pairs],
        "difference": [str(d) for d in found],
        "n": [str(d.n) for d in found],
        "kind": [_kind(d) for d in found],
        f"n for ±{within:g}": [
            NONE if (k := seeds_for(d, within)) is None else f"{k:,}" for d in found
        ],
    }
    return folded(f"differences of {metric}", columns)


def _kind(difference: Difference) -> str:
    if difference.low is None and not difference.paired:
        return "means"
    if difference.n == 1:
        return "one pair"
    return "paired" if difference.paired else "Welch"


def _variances(scores: Scores) -> tuple[float | None, float | None]:
    """Estimates of the variances between sets (may be negative) and within them."""
    groups = list(scores.values())
    n, sets = sum(map(len, groups)), len(groups)
    if n == sets:
        return None, None
    means = [fmean(group) for group in groups]
    squares = sum((v - m) ** 2 for m, group in zip(means, groups, strict=True) for v in group)
    within = squares / (n - sets)
    if sets < 2:
        return None, within
    sizes = [len(group) for group in groups]
    mean = fmean(value for group in groups for value in group)
    spread = sum(size * (m - mean) ** 2 for size, m in zip(sizes, means, strict=True))
    typical = (n - sum(size**2 for size in sizes) / n) / (sets - 1)  # n / sets if balanced
    return (spread / (sets - 1) - within) / typical, within


def _t(freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit  # scipy.stats takes a second to load

    return float(stdtrit(freedom, 0.975))


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}"

"""One cell of a paper's table: what its authors printed, and the rows that we have of it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from eval.results.rows import EvalResult
from eval.results.statistics import Metric, Scores, scores_by_set

MEAN = "mean of students"


@dataclass(frozen=True, kw_only=True)
class TableCell:
    """One cell: a row of the paper at one dataset, IPC and student, by the paper's names."""

    row: str
    dataset: str
    ipc: str
    student: str
    paper: tuple[float, float | None] | None = None  # mean and std as printed
    band: tuple[float, float] | None = None  # of means that count as reproduced
    family: str | None = None  # the evaluator family that the paper's number is of
    our_family: str | None = None  # and ours
    ours: tuple[EvalResult, ...] = ()
    asked: int = 0  # students that the experiment asks for; 0: it has no such run
    command: str | None = None  # that makes it; None: nothing here does
    folders: tuple[str, ...] = ()  # of its sets, seen from the table's folder

    @property
    def place(self) -> tuple[str, str, str]:
        """The column."""
        return self.dataset, self.ipc, self.student

    def score(self, metric: Metric) -> tuple[float, float | None] | None:
        """Our mean and population std (None: of one student), or None."""
        values = [getattr(r, metric) for r in self.ours]
        if not values:
            return None
        return statistics.fmean(values), statistics.pstdev(values) if len(values) > 1 else None

    @property
    def comparable(self) -> bool:
        """May ours be held against the paper's? Only under evaluators of one family."""
        return self.family in (None, self.our_family)

    @property
    def difference(self) -> float | None:
        """Our best minus the paper's, which is a best as well, of the same family."""
        best = self.score("top1_best")
        return best[0] - self.paper[0] if best and self.paper and self.comparable else None

    @property
    def verdict(self) -> str:
        """Our mean against the band, where there are both, of one family."""
        best = self.score("top1_best")
        if not best or not self.band or not self.comparable:
            return ""
        low, high = self.band
        return f"{'inside' if low <= best[0] <= high else 'outside'} {low:g} to {high:g}"

    @property
    def by_set(self) -> Scores:
        """Our best scores by distillation seed."""
        return scores_by_set(self.ours, "top1_best")


def averaged(rows: Sequence[EvalResult], students: Sequence[str]) -> tuple[EvalResult, ...]:
    """One row for each pair of seeds that all `students` were trained with: their mean."""
    groups: dict[tuple, dict[str, EvalResult]] = defaultdict(dict)
    for r in rows:
        groups[r.train_data, r.test_data, r.distill_seed, r.student_seed][r.student] = r
    found = []
    for group in groups.values():
        if set(group) != set(students):
            continue
        last, best = (
            statistics.fmean(getattr(r, m) for r in group.values())
            for m in ("top1_last", "top1_best")
        )
        first = next(iter(group.values()))
        found.append(replace(first, student=MEAN, top1_last=last, top1_best=best))
    return tuple(found)

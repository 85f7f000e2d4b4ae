"""Tables of result rows: mean, spread and paired differences, as terminal, Markdown and JSON."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from scipy.stats import t as student_t

from eval.results import EvalResult, order_of


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All students of one kind on one method's sets; one value per (distill, student) seed pair."""

    cell_id: str
    method: str  # with «#id» where a table holds two configurations of one name
    dataset: str
    ipc: int
    protocol: str
    student: str
    top1_last_mean: float
    top1_last_std: float  # population deviation, as the papers' np.std
    top1_best_mean: float
    top1_best_std: float
    n: int
    distill_seeds: int
    student_seeds: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired difference of `top1_last` to a reference method on the same distillation seeds."""

    mean: float
    low: float  # 95 % t-interval over distillation seeds
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def cells(rows: Sequence[EvalResult]) -> list[Cell]:
    """One cell per configuration (seeds apart) and student, in order of appearance."""
    groups: dict[tuple[str, str], list[EvalResult]] = defaultdict(list)
    namesakes: dict[tuple, set[str]] = defaultdict(set)
    for r in rows:
        groups[r.cell_id, r.student].append(r)
        namesakes[_name(r)].add(r.cell_id)
    return [
        Cell(
            cell_id=cell_id,
            method=r.method + (f" #{cell_id}" if len(namesakes[_name(r)]) > 1 else ""),
            dataset=r.dataset,
            ipc=r.ipc,
            protocol=r.protocol,
            student=student,
            top1_last_mean=statistics.fmean(r.top1_last for r in group),
            top1_last_std=statistics.pstdev(r.top1_last for r in group),
            top1_best_mean=statistics.fmean(r.top1_best for r in group),
            top1_best_std=statistics.pstdev(r.top1_best for r in group),
            n=len(group),
            distill_seeds=len({r.distill_seed for r in group}),
            student_seeds=len({r.student_seed for r in group}),
        )
        for (cell_id, student), group in groups.items()
        for r in group[:1]
    ]


def paired_difference(rows: Sequence[EvalResult], cell: Cell, reference: str) -> Difference | None:
    """`cell` minus the method `reference`, paired by distillation seed.

    None under two pairs, or where the reference is not one configuration.
    """
    others = [
        c
        for c in cells(rows)
        if (c.method, c.dataset, c.ipc, c.protocol, c.student)
        == (reference, cell.dataset, cell.ipc, cell.protocol, cell.student)
    ]
    if len(others) != 1 or others[0].cell_id == cell.cell_id:
        return None
    ours, theirs = (_by_seed(rows, c) for c in (cell, others[0]))
    differences = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if len(differences) < 2:
        return None
    mean, n = statistics.fmean(differences), len(differences)
    half = student_t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    return Difference(mean=mean, low=mean - half, high=mean + half, n=n)


def _name(row: EvalResult) -> tuple[str, str, int, str]:
    return row.method, row.dataset, row.ipc, row.protocol


def _by_seed(rows: Sequence[EvalResult], cell: Cell) -> dict[int, float]:
    """Mean `top1_last` over student seeds, by distillation seed."""
    found: dict[int, list[float]] = defaultdict(list)
    for r in rows:
        if (r.cell_id, r.student) == (cell.cell_id, cell.student):
            found[r.distill_seed].append(r.top1_last)
    return {seed: statistics.fmean(values) for seed, values in found.items()}


REFERENCE = "unguided"  # the method that others are compared with, seed by seed
HEADERS = ["dataset", "ipc", "protocol", "student", "method", "top1_last", "top1_best", "n"]


def table_rows(rows: Sequence[EvalResult]) -> list[list[str]]:
    """Formatted rows under `HEADERS` (and the difference's column), methods side by side."""
    found = cells(rows)
    students = order_of(c.student for c in found)
    found.sort(key=lambda c: (c.dataset, c.ipc, c.protocol, students.index(c.student)))
    out = []
    for c in found:
        difference = paired_difference(rows, c, REFERENCE)
        out.append(
            [
                c.dataset,
                str(c.ipc),
                c.protocol,
                c.student,
                c.method,
                f"{c.top1_last_mean:.1f} ± {c.top1_last_std:.1f}",
                f"{c.top1_best_mean:.1f} ± {c.top1_best_std:.1f}",
                str(c.n),
                str(difference) if difference else "",
            ]
        )
    return out


def headers() -> list[str]:
    """Column titles of `table_rows`."""
    return [*HEADERS, f"minus {REFERENCE}"]


def markdown(rows: Sequence[EvalResult]) -> str:
    """The table as Markdown, with a line that says what the numbers are."""
    lines = [headers(), ["---"] * len(headers()), *table_rows(rows)]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{body}\n\n{explanation(rows)}\n"


def terminal(rows: Sequence[EvalResult]) -> Table:
    """The table for a terminal; without its last column where there is nothing to compare."""
    lines = table_rows(rows)
    columns = len(headers()) - (not any(line[-1] for line in lines))
    table = Table(caption=explanation(rows), caption_justify="left", box=box.SIMPLE_HEAD)
    for title in headers()[:columns]:
        table.add_column(title, justify="right" if title in ("ipc", "n") else "left", no_wrap=True)
    for line in lines:
        table.add_row(*line[:columns])
    return table


def explanation(rows: Sequence[EvalResult]) -> str:
    """What the table's numbers are, and what a reader must not do with them."""
    text = (
        "Top-1 accuracy in percent on the real test images, mean ± population std over n trained "
        "students (distillation seeds x student seeds); top1_last after the last epoch, top1_best "
        "the best of all tests. «minus» is the difference of top1_last, paired by distillation "
        f"seed, with a 95 % t-interval. Protocol: {', '.join(order_of(r.protocol for r in rows))}."
    )
    notes = order_of(r.dataset_note for r in rows if r.dataset_note)
    return " ".join([text, *(f"Note: {note}." for note in notes)])

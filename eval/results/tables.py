"""Tables of result rows: mean, spread and paired differences, as terminal, Markdown and JSON."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from scipy.stats import t as student_t

from eval.results.rows import EvalResult, order_of


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
    mean, low, high = interval(differences)
    return Difference(mean=mean, low=low, high=high, n=len(differences))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of independent values and its 95 % t-interval; a point for a single value."""
    mean, n = statistics.fmean(values), len(values)
    half = student_t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5 if n > 1 else 0.0
    return mean, mean - half, mean + half


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


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table ready to print: what all cells share stands in the title, not in columns."""

    title: str
    headers: list[str]
    lines: list[list[str]]

    def markdown(self) -> str:
        """Title and table."""
        lines = [self.headers, ["---"] * len(self.headers), *self.lines]
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{self.title}**\n\n{body}\n"

    def for_terminal(self) -> Table:
        """The same for a terminal; a narrow one folds cells rather than cut them."""
        table = Table(title=self.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for header in self.headers:
            table.add_column(header, overflow="fold")
        for line in self.lines:
            table.add_row(*map(_emphasised, line))
        return table


def _emphasised(text: str) -> str:
    """Markdown's **bold** and *italics* as rich's markup; brackets are no tags."""
    text = re.sub(r"\*\*(.+?)\*\*", r"[bold]\1[/bold]", escape(text))
    return re.sub(r"\*(.+?)\*", r"[italic]\1[/italic]", text)


def layout(rows: Sequence[EvalResult]) -> Layout:
    """Cells as text, methods of one student side by side."""
    found = cells(rows)
    students = order_of(c.student for c in found)
    found.sort(key=lambda c: (c.dataset, c.ipc, c.protocol, students.index(c.student)))
    differences = [paired_difference(rows, c, REFERENCE) for c in found]
    columns = {
        "dataset": [c.dataset for c in found],
        "ipc": [str(c.ipc) for c in found],
        "protocol": [c.protocol for c in found],
        "student": [c.student for c in found],
        "method": [c.method for c in found],
        "top1_last": [f"{c.top1_last_mean:.1f} ± {c.top1_last_std:.1f}" for c in found],
        "top1_best": [f"{c.top1_best_mean:.1f} ± {c.top1_best_std:.1f}" for c in found],
        "n": [str(c.n) for c in found],
        f"minus {REFERENCE}": [str(d) if d else "" for d in differences],
    }
    foldable = ("dataset", "ipc", "protocol", "student")
    shared = {k: columns.pop(k)[0] for k in foldable if _one(columns[k])}
    title = ", ".join(f"ipc {v}" if k == "ipc" else v for k, v in shared.items())
    if not any(differences):
        columns.pop(f"minus {REFERENCE}")
    lines = [list(line) for line in zip(*columns.values(), strict=True)]
    return Layout(title=title, headers=list(columns), lines=lines)


def markdown(rows: Sequence[EvalResult]) -> str:
    """The table as Markdown, with a line that says what the numbers are."""
    return f"{layout(rows).markdown()}\n{explanation(rows)}\n"


def terminal(rows: Sequence[EvalResult]) -> Group:
    """The table for a terminal, and what its numbers are."""
    return Group(layout(rows).for_terminal(), explanation(rows))


def explanation(rows: Sequence[EvalResult]) -> str:
    """What the table's numbers are, and what a reader must not do with them."""
    text = (
        "Top-1 accuracy in percent on the real test images, mean ± population std over n trained "
        "students (distillation seeds x student seeds); top1_last after the last epoch, top1_best "
        f"the best of all tests. «minus {REFERENCE}» is the difference of top1_last, paired by "
        "distillation seed, with a 95 % t-interval."
    )
    return " ".join([text, *notes(rows)])


def notes(rows: Sequence[EvalResult]) -> list[str]:
    """What a reader must know of these rows: the data, the teachers, several commits."""
    found = [f"Note: {n}." for n in order_of(r.dataset_note for r in rows if r.dataset_note)]
    for teacher, top1 in order_of((r.teacher, r.teacher_top1) for r in rows if r.teacher):
        found.append(f"Teacher {teacher}: {top1:.1f} % of the real test images.")
    commits = order_of(r.commit for r in rows)
    if len(commits) > 1:
        found.append(f"Warning: rows of {len(commits)} commits stand here: {', '.join(commits)}.")
    return found


def _one(values: Sequence[str]) -> bool:
    return len(set(values)) == 1

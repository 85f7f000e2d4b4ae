"""Which rows are one cell of a table, what a cell is called, and where its accuracy compares."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from eval.results.layout import PLACE
from eval.results.rows import EvalResult, order_of


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All students of one kind on one method's sets; one value per (distill, student) seed pair."""

    cell_id: str
    variant: str | None  # where a sweep tells runs of one method apart
    method: str  # with the variant, and what tells it from another of its name
    dataset: str
    ipc: int
    protocol: str
    student: str
    role: str | None  # the method's part in comparisons: random, full or unguided
    train_data: str | None  # digests of the real images
    test_data: str | None
    top1_last_mean: float
    top1_last_std: float | None  # population deviation, as the papers' np.std; None: of one student
    top1_best_mean: float
    top1_best_std: float | None
    n: int
    distill_seeds: int  # sets; 1 for a method without seeds
    student_seeds: int

    @property
    def place(self) -> tuple[Hashable, ...]:
        """Where the accuracy compares: dataset, its test images, IPC, protocol, student."""
        return self.dataset, self.test_data, self.ipc, self.protocol, self.student

    def rows(self, rows: Sequence[EvalResult]) -> list[EvalResult]:
        """Those of a table's rows that are this cell's."""
        key = self.cell_id, self.variant, self.student, self.train_data, self.test_data
        return [r for r in rows if r.cell == key]


def cells(rows: Sequence[EvalResult]) -> list[Cell]:
    """One cell per configuration (seeds apart), student and real images, as they appear."""
    groups: dict[tuple, list[EvalResult]] = defaultdict(list)
    for r in rows:
        groups[r.cell].append(r)
    names = _names([group[0] for group in groups.values()])
    return [_cell(name, group) for name, group in zip(names, groups.values(), strict=True)]


def names_by_cell(rows: Sequence[EvalResult]) -> dict[tuple[Hashable, ...], str]:
    """What a table of these rows calls each `row.cell`."""
    return {
        (c.cell_id, c.variant, c.student, c.train_data, c.test_data): c.method for c in cells(rows)
    }


def in_order(found: Sequence[Cell]) -> list[Cell]:
    """By dataset, IPC, protocol, then students and methods as they appeared."""
    students = order_of(c.student for c in found)
    return sorted(found, key=lambda c: (c.dataset, c.ipc, c.protocol, students.index(c.student)))


def places(found: Sequence[Cell]) -> dict[str, list[str]]:
    """The columns that say where each line's cell stands."""
    return {name: [str(getattr(c, name)) for c in found] for name in PLACE}


def _cell(name: str, group: Sequence[EvalResult]) -> Cell:
    first = group[0]
    spread = statistics.pstdev if len(group) > 1 else lambda _: None
    return Cell(
        cell_id=first.cell_id,
        variant=first.variant,
        method=name,
        dataset=first.dataset,
        ipc=first.ipc,
        protocol=first.protocol,
        student=first.student,
        role=first.role,
        train_data=first.train_data,
        test_data=first.test_data,
        top1_last_mean=statistics.fmean(r.top1_last for r in group),
        top1_last_std=spread([r.top1_last for r in group]),
        top1_best_mean=statistics.fmean(r.top1_best for r in group),
        top1_best_std=spread([r.top1_best for r in group]),
        n=len(group),
        distill_seeds=len({r.distill_seed for r in group}),
        student_seeds=len({r.student_seed for r in group}),
    )


def _names(firsts: Sequence[EvalResult]) -> list[str]:
    """Each cell's method, with what tells it from its namesakes.

    That is the length of the training or, where it does not tell them all apart, the id; then the
    real images.
    """

    def names_in(row: EvalResult) -> tuple[Hashable, ...]:
        return row.name, row.dataset, row.ipc, row.protocol

    namesakes: dict[tuple, list[tuple]] = defaultdict(list)
    epochs: dict[tuple, set[tuple[str, int]]] = defaultdict(set)
    for row in firsts:
        namesakes[names_in(row)].append((row.cell_id, row.train_data, row.test_data))
        epochs[names_in(row)].add((row.cell_id, row.epochs))
    found = []
    for row in firsts:
        others, name = namesakes[names_in(row)], row.name
        if len(set(others)) > 1:
            lengths = epochs[names_in(row)]
            told = len({n for _, n in lengths}) == len({i for i, _ in lengths}) == len(lengths) > 1
            name += f", {row.epochs} epochs" if told else f" #{row.cell_id}"
        twins = [other for other in others if other[0] == row.cell_id]
        for k, (what, data) in enumerate((("train", row.train_data), ("test", row.test_data)), 1):
            if len({twin[k] for twin in twins}) > 1:
                name += f" {what} {data[:8] if data else 'unknown'}"
        found.append(name)
    return found

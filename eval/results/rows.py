"""Result rows: one line of JSON per trained student; every table is a view of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TypeVar

from mgd3.runtime.files import waiting, writing

T = TypeVar("T", bound=Hashable)
log = logging.getLogger(__name__)

RANDOM, FULL, UNGUIDED = "random", "full", "unguided"  # the roles that others are held against


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One student; accuracies in percent of the real test images."""

    dataset: str
    ipc: int
    method: str
    protocol: str
    student: str
    distill_seed: int | None  # None: the method has no seed, its set is one
    student_seed: int
    top1_last: float  # after the last epoch
    top1_best: float  # the best of all tests, as the papers report
    tests: int  # how many tests `top1_best` chose from
    test_images: int
    epochs: int
    train_seconds: float
    test_seconds: float
    run_id: str
    cell_id: str  # digest of the configuration without its seeds: rows of one table cell
    commit: str
    dataset_note: str | None = None
    teacher: str | None = None  # whose answers the student learned; None: the classes themselves
    teacher_top1: float | None = None
    machine: str | None = None  # what trained it
    role: str | None = None  # the method's part in comparisons: random, full or unguided
    labels: str = (
        "hard"  # what students learn: the classes («hard»), or a teacher's answers («soft»)
    )
    augmented: bool = True  # did the protocol augment and mix the training images?
    train_data: str | None = None  # digest of the real training images that the set was made from
    test_data: str | None = None  # digest of the real test images
    variant: str | None = None  # «key=value», where a view tells a sweep's runs apart; never stored

    @property
    def name(self) -> str:
        """The method, and what of it a sweep varies."""
        return self.method if self.variant is None else f"{self.method} {self.variant}"

    @property
    def cell(self) -> tuple[Hashable, ...]:
        """Rows that share this are one table cell: one configuration, student and real images."""
        return self.cell_id, self.variant, self.student, self.train_data, self.test_data

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What makes this student; rows that share it are copies."""
        return *self.cell, self.distill_seed, self.student_seed


class ResultStore:
    """`results.jsonl`, append-only; a line cut short by a kill is dropped and its student rerun."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rows(self) -> list[EvalResult]:
        """Every whole row."""
        return [row for line in self._lines() if (row := _parse(line)) is not None]

    def has(self, student: str, student_seed: int) -> bool:
        """Is this student done?"""
        return any(r.student == student and r.student_seed == student_seed for r in self.rows())

    def append(self, row: EvalResult) -> None:
        """Add a row; it is on disk when this returns."""
        values = asdict(row)
        del values["variant"]
        line = json.dumps(values) + "\n"
        with writing(self.path), waiting(self.path.parent):
            self._drop_torn_line()
            with self.path.open("a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())

    def _lines(self) -> list[str]:
        if not self.path.is_file():
            return []
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")  # what follows was cut short
        return whole.decode(errors="replace").splitlines()

    def _drop_torn_line(self) -> None:
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            log.warning("%s ends in a line cut short; dropped", self.path)
            os.truncate(self.path, len(whole))


def read_results(folder: Path) -> list[EvalResult]:
    """All rows of all runs below `folder`, ordered by path; each student counted once."""
    rows: dict[tuple, EvalResult] = {}
    for path in sorted(folder.rglob("results.jsonl")):
        for row in ResultStore(path).rows():
            rows[row.key] = row
    return list(rows.values())


def order_of(values: Iterable[T]) -> list[T]:
    """Distinct values in order of first appearance."""
    return list(dict.fromkeys(values))


def _parse(line: str) -> EvalResult | None:
    try:
        values = json.loads(line)
        known = {f.name for f in fields(EvalResult)}
        return EvalResult(**{name: value for name, value in values.items() if name in known})
    except (ValueError, AttributeError, TypeError):
        return None

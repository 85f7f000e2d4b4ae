"""Result rows: one line of JSON per trained student; every table is a view of them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Hashable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import Field

from mgd3.runtime.errors import UserError
from mgd3.storage.documents import Count, Name, Number, Percent, fitting
from mgd3.storage.files import waiting, writing

T = TypeVar("T", bound=Hashable)
log = logging.getLogger(__name__)

_REMEDY = "take that line out and run the same command: the student is trained again"

RANDOM, FULL, UNGUIDED = "random", "full", "unguided"  # the roles that others are held against


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """One student; accuracies in percent of the real test images."""

    dataset: Name
    ipc: Annotated[int, Field(ge=1)]
    method: Name
    protocol: Name
    student: str
    distill_seed: Count | None  # None: the method has no seed, its set is one
    student_seed: Count
    top1_last: Percent  # after the last epoch
    top1_best: Percent  # the best of all tests, as the papers report
    tests: Count  # how many tests `top1_best` chose from
    test_images: Count
    epochs: Annotated[int, Field(ge=1)]
    train_seconds: Number
    test_seconds: Number
    run_id: str
    cell_id: str  # digest of the configuration without its seeds: rows of one table cell
    commit: str
    dataset_note: str | None = None
    teacher: str | None = None  # whose answers the student learned; None: the classes themselves
    teacher_source: str | None = None  # trained here, a file, torchvision's; None: not recorded
    teacher_top1: Percent | None = None
    machine: str | None = None  # what trained it
    device: str | None = None  # cpu or cuda
    threads: int | None = None  # that shared one operation: sums in another order round apart
    deterministic: bool | None = None  # compute.deterministic
    compiled: bool | None = None  # was the student's training? torch.compile rounds apart
    channels_last: bool | None = None  # compute.channels_last, which does too
    versions: str | None = None  # of Python and the libraries that a score depends on
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


CIRCUMSTANCES = (
    "machine", "device", "threads", "deterministic", "compiled", "channels_last", "versions",
)  # fmt: skip  # of a training


class ResultStore:
    """`results.jsonl`, append-only; a line cut short by a kill is dropped and its student rerun."""

    def __init__(self, path: Path, run: str | None = None) -> None:
        """`run` is the id that all rows must have; None takes what the folder's name says."""
        self.path, self.run = path, run

    def rows(self) -> list[EvalResult]:
        """Every row; `UserError` for a line that is none, or a row of another run."""
        lines = enumerate(self._lines(), start=1)
        rows = [self._parsed(number, line) for number, line in lines if line.strip()]
        if not rows:
            return rows
        first = rows[0]
        named = re.fullmatch(f"{re.escape(first.protocol)}-([0-9a-f]{{8}})", self.path.parent.name)
        run = self.run or (named[1] if named else first.run_id)
        for number, row in enumerate(rows, start=1):
            if (row.run_id, row.protocol) != (run, first.protocol):
                raise UserError(
                    f"{self.path}, row {number}, is of run {row.run_id}, but this folder is run "
                    f"{run}'s: the file was edited or comes from elsewhere; {_REMEDY}"
                )
        return rows

    def _parsed(self, number: int, line: str) -> EvalResult:
        return fitting(line, EvalResult, f"{self.path}, line {number}", _REMEDY)

    def has(self, student: str, student_seed: int) -> bool:
        """Is this student done?"""
        return any(r.student == student and r.student_seed == student_seed for r in self.rows())

    def append(self, row: EvalResult) -> None:
        """Add a row; it is on disk when this returns."""
        values = asdict(row)
        del values["variant"]
        line = json.dumps(values) + "\n"
        if self.path.is_symlink():
            raise UserError(f"{self.path} is a link, and links in a run are not followed")
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
        return whole.decode(errors="replace").split("\n")

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

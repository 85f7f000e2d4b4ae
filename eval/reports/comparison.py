"""Our numbers beside a paper's, cell by cell: Markdown, LaTeX, CSV and plain records.

Ours is what finished runs hold, the paper's what its authors printed, and a cell never shows one as
the other: where we have run nothing, ours is empty.
"""

from __future__ import annotations

import csv
import io
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.results.rows import EvalResult, order_of
from eval.results.statistics import Metric, Scores, compare
from eval.results.tables import Layout, notes

PLACES = ("dataset", "ipc", "student")
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
    ours: tuple[EvalResult, ...] = ()
    asked: int = 0  # students that the experiment asks for; 0: it has no such run

    @property
    def place(self) -> tuple[str, str, str]:
        """The column."""
        return self.dataset, self.ipc, self.student

    def score(self, metric: Metric) -> tuple[float, float] | None:
        """Our mean and population std, or None."""
        values = [getattr(r, metric) for r in self.ours]
        return (statistics.fmean(values), statistics.pstdev(values)) if values else None

    @property
    def difference(self) -> float | None:
        """Our best minus the paper's, which is a best as well."""
        best = self.score("top1_best")
        return best[0] - self.paper[0] if best and self.paper else None

    @property
    def verdict(self) -> str:
        """Our mean against the band, where there are both."""
        best = self.score("top1_best")
        if not best or not self.band:
            return ""
        low, high = self.band
        return f"{'inside' if low <= best[0] <= high else 'outside'} {low:g} to {high:g}"

    @property
    def by_set(self) -> Scores:
        """Our best scores by distillation seed."""
        found: dict[int, list[float]] = defaultdict(list)
        for r in sorted(self.ours, key=lambda r: (r.distill_seed, r.student_seed)):
            found[r.distill_seed].append(r.top1_best)
        return found


@dataclass(frozen=True, kw_only=True)
class PaperComparison:
    """A table of the paper with our numbers in it."""

    title: str
    cells: Sequence[TableCell]
    remarks: Sequence[str] = ()  # before the numbers
    errata: Mapping[str, str] | None = None  # by row; «table»: of all
    claims: Sequence[Mapping[str, Any]] = ()

    @property
    def columns(self) -> list[tuple[str, str, str]]:
        """Places: datasets and students as they appear, IPC by size, the full set last."""
        places = order_of(c.place for c in self.cells)
        datasets, students = (order_of(p[i] for p in places) for i in (0, 2))

        def rank(place: tuple[str, str, str]) -> tuple[int, float, int]:
            dataset, ipc, student = place
            size = float(ipc) if ipc.isdigit() else float("inf")
            return datasets.index(dataset), size, students.index(student)

        return sorted(places, key=rank)

    def matrix(self) -> Layout:
        """The paper's own shape: ours in bold with (n), the paper's in italics."""
        columns = self.columns
        shared = [{place[i] for place in columns} for i in range(3)]
        marks = {row: f" [{k}]" for k, row in enumerate(self._footnotes(), 1)}
        by_place = {(c.row, c.place): c for c in self.cells}
        lines = [
            [row + marks.get(row, ""), *(_text(by_place.get((row, place))) for place in columns)]
            for row in order_of(c.row for c in self.cells)
        ]
        varying = [i for i in range(3) if len(shared[i]) > 1]
        fixed = [_spoken(i, columns[0][i]) for i in range(3) if i not in varying]
        headers = [" ".join(_spoken(i, place[i]) for i in varying) for place in columns]
        if not varying:
            headers = ["top-1"]
        title = ", ".join([self.title, *fixed])
        return Layout(title=title, headers=["method", *headers], lines=lines)

    def details(self) -> Layout:
        """A line for every cell that has been run."""
        lines = []
        for c in self.cells:
            if not c.ours:
                continue
            n = str(len(c.ours)) + (f" of {c.asked}" if len(c.ours) < c.asked else "")
            difference = "" if c.difference is None else f"{c.difference:+.1f}"
            scores = [_number(c.score(m)) for m in ("top1_best", "top1_last")]
            lines.append([c.row, *c.place, *scores, n, _number(c.paper), difference, c.verdict])
        headers = ["method", *PLACES, "best", "last", "n", "paper", "best - paper", "band"]
        kept = [i for i, h in enumerate(headers) if h == "n" or any(line[i] for line in lines)]
        return Layout(
            title="Every cell that has been run",
            headers=[headers[i] for i in kept],
            lines=[[line[i] for i in kept] for line in lines],
        )

    def orderings(self) -> Layout | None:
        """What the paper claims of two rows, and what our runs say of it."""
        lines = []
        for claim in self.claims:
            more, than, by = claim["more"], claim["than"], claim.get("by", 0)
            for place in order_of(c.place for c in self.cells):
                if any(str(claim.get(k, v)) != v for k, v in zip(PLACES, place, strict=True)):
                    continue
                here = {c.row: c for c in self.cells if c.place == place and c.ours}
                if not {more, than} <= set(here):
                    continue
                pair = here[more], here[than]
                found = compare(pair[0].by_set, pair[1].by_set)
                if found is None:
                    verdict = "needs more seeds"
                elif found.low > by:
                    verdict = "holds"
                elif found.high < by:
                    verdict = "does not hold"
                else:
                    verdict = "not established"
                text = f"{more} > {than}" + (f" by {by:g}" if by else "")
                lines.append([text, *place, str(found) if found else "", verdict])
        if not lines:
            return None
        headers = ["claim", *PLACES, "difference of best, 95 %", "our runs"]
        return Layout(title="Orderings", headers=headers, lines=lines)

    def remarks_and_notes(self) -> list[str]:
        """What a reader must know of these numbers."""
        ours = [r for c in self.cells for r in c.ours]
        rows = order_of(c.row for c in self.cells)
        found = list(self.remarks)
        found += [f"[{k}] {text}" for k, text in enumerate(self._footnotes().values(), 1)]
        if self.errata and "table" in self.errata:
            found.append(self.errata["table"])
        partly = [c for c in self.cells if c.ours and len(c.ours) < c.asked]
        if partly:
            found.append(f"{len(partly)} cells have fewer students than asked for (column n).")
        protocols = order_of(r.protocol for r in ours)
        by_row = [{r.protocol for c in self.cells if c.row == row for r in c.ours} for row in rows]
        if any(len(found_in_row) > 1 for found_in_row in by_row):
            found.append(f"Warning: several protocols stand in one row: {', '.join(protocols)}.")
        elif protocols:
            found.append(f"Our runs' protocol: {', '.join(protocols)}.")
        machines = order_of(r.machine for r in ours if r.machine)
        if machines:
            found.append(f"Machines: {'; '.join(machines)}.")
        commits = order_of(r.commit for r in ours)
        if len(commits) == 1:
            found.append(f"Students trained by commit: {commits[0]}.")
        return [*found, *notes(ours)]

    def markdown(self) -> str:
        """Everything, as a page."""
        remarks = [f"- {note}" for note in self.remarks_and_notes()]
        if not self.cells:
            return "\n".join([f"**{self.title}**", "", *remarks]) + "\n"
        tables = [self.matrix(), self.details(), self.orderings()]
        parts = [t.markdown() for t in tables if t is not None and t.lines]
        return "\n".join([*parts, KEY, "", *remarks]) + "\n"

    def latex(self) -> str:
        """The matrix for a paper (booktabs), remarks as comments."""
        table = self.matrix()
        rows = [table.headers, *table.lines]
        body = [" & ".join(_latex(text) for text in row) + r" \\" for row in rows]
        lines = [
            *(f"% {note}" for note in [KEY, *self.remarks_and_notes()]),
            rf"\begin{{tabular}}{{l{'c' * (len(table.headers) - 1)}}}",
            r"\toprule",
            body[0],
            r"\midrule",
            *body[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """A line per cell, run or not."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(self.records()[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records())
        return buffer.getvalue()

    def records(self) -> list[dict[str, Any]]:
        """Every cell's numbers; None where there are none. `note`: erratum and remarks."""
        remarks = list(self.remarks)
        errata = self.errata or {}
        return [
            _record(c) | {"note": " ".join([*filter(None, [errata.get(c.row)]), *remarks]) or None}
            for c in self.cells
        ]

    def _footnotes(self) -> dict[str, str]:
        return {row: text for row, text in (self.errata or {}).items() if row != "table"}


KEY = (
    "Top-1 accuracy in percent on real test images. Bold: our runs, mean ± population std of the "
    "best test of n students, (n). Italics: the paper's printed mean ± std, which we have not "
    "measured. Without bold nothing has been run. Differences compare best with best; `last` is "
    "the accuracy after the last epoch."
)


def averaged(rows: Sequence[EvalResult], students: Sequence[str]) -> tuple[EvalResult, ...]:
    """One row for each pair of seeds that all `students` were trained with: their mean."""
    groups: dict[tuple[int, int], dict[str, EvalResult]] = defaultdict(dict)
    for r in rows:
        groups[r.distill_seed, r.student_seed][r.student] = r
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


def _record(c: TableCell) -> dict[str, Any]:
    best, last = c.score("top1_best"), c.score("top1_last")
    ours = {
        f"ours_{name}_{what}": None if score is None else round(score[k], 2)
        for name, score in (("best", best), ("last", last))
        for k, what in enumerate(("mean", "std"))
    }
    return {
        "method": c.row,
        "dataset": c.dataset,
        "ipc": c.ipc,
        "student": c.student,
        **ours,
        "n": len(c.ours),
        "asked": c.asked,
        "paper_mean": c.paper[0] if c.paper else None,
        "paper_std": c.paper[1] if c.paper else None,
        "difference": None if c.difference is None else round(c.difference, 2),
        "band": c.verdict or None,
        "protocol": ", ".join(order_of(r.protocol for r in c.ours)) or None,
        "commit": ", ".join(order_of(r.commit for r in c.ours)) or None,
    }


def _text(cell: TableCell | None) -> str:
    if cell is None:
        return ""
    best = cell.score("top1_best")
    ours = [f"**{_number(best)}** ({len(cell.ours)})"] if best else []
    paper = [f"*{_number(cell.paper)}*"] if cell.paper else []
    return " / ".join(ours + paper)


def _spoken(place: int, value: str) -> str:
    return f"ipc {value}" if PLACES[place] == "ipc" else value


def _number(score: tuple[float, float | None] | None) -> str:
    if score is None:
        return ""
    mean, std = score
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def _latex(text: str) -> str:
    """Markdown's emphasis and special characters as LaTeX."""
    bold, *rest = text.split("**") if text.count("**") == 2 else ["", "", text]
    if rest[0]:
        return bold + rf"\textbf{{{_latex(rest[0])}}}" + _latex(rest[1])
    for character in "&%_#":
        text = text.replace(character, "\\" + character)
    text = text.replace("±", r"$\pm$").replace(">", "$>$")
    parts = text.split("*")
    return "".join(rf"\textit{{{p}}}" if i % 2 else p for i, p in enumerate(parts))

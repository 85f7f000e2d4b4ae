"""Our numbers beside a paper's, cell by cell: Markdown, LaTeX, CSV and plain records.

Ours is what finished runs hold, the paper's what its authors printed, and a cell never shows one as
the other: where we have run nothing, ours is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from eval.reports.paper_cell import TableCell
from eval.results.layout import Entry, Layout, Span, csv_text, mean_and_std, spoken
from eval.results.rows import order_of
from eval.results.statistics import Difference, Metric, compare
from eval.results.tables import notes
from mgd3.runtime.text import markdown_text, one_line

PLACES = ("dataset", "ipc", "student")
Column: TypeAlias = tuple[str, str, str]  # one of each
METRICS: tuple[Metric, ...] = ("top1_best", "top1_last")
KEY = (
    "Top-1 accuracy in percent on real test images. Bold: our runs, mean ± population std of the "
    "best test of n students, (n). Italics: the paper's printed mean ± std, which we have not "
    "measured. Without bold nothing has been run. Differences compare best with best; «last» is "
    "the accuracy after the last epoch."
)


@dataclass(frozen=True, kw_only=True)
class PaperComparison:
    """A table of the paper with our numbers in it."""

    title: str
    cells: Sequence[TableCell]
    remarks: Sequence[str] = ()  # before the numbers
    errata: Mapping[str, str] | None = None  # by row; «table»: of all
    claims: Sequence[Mapping[str, Any]] = ()
    swept: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by key, by row
    families: Mapping[str, str] = field(default_factory=dict)  # evaluators, in words
    advice: str = ""  # what to do where nothing has been run

    @property
    def columns(self) -> list[Column]:
        """Places: datasets and students as they appear, IPC by size, the full set last."""
        places = order_of(c.place for c in self.cells)
        datasets, students = (order_of(p[i] for p in places) for i in (0, 2))

        def rank(place: tuple[str, str, str]) -> tuple[int, float, int]:
            dataset, ipc, student = place
            size = float(ipc) if ipc.isdigit() else float("inf")
            return datasets.index(dataset), size, students.index(student)

        return sorted(places, key=rank)

    def matrices(self, fits: Callable[[Layout], bool]) -> list[Layout]:
        """The matrix, in parts that fit: datasets below one another, then as many columns as do."""
        return self._parts(self.columns, fits)

    def _parts(self, columns: list[Column], fits: Callable[[Layout], bool]) -> list[Layout]:
        whole = self.matrix(columns)
        if len(columns) < 2 or fits(whole):
            return [whole]
        datasets = order_of(dataset for dataset, _, _ in columns)
        if len(datasets) > 1:
            parts = [[c for c in columns if c[0] == dataset] for dataset in datasets]
        else:
            most = len(columns) - 1
            while most > 1 and not fits(self.matrix(columns[:most])):
                most -= 1
            parts = [columns[:most], columns[most:]]
        return [layout for part in parts for layout in self._parts(part, fits)]

    def matrix(self, columns: Sequence[Column] | None = None) -> Layout:
        """The paper's own shape: ours with (n), then the paper's; of some columns, or of all."""
        whole, columns = self.columns, columns or self.columns
        marks = {row: f" [{k}]" for k, row in enumerate(self._footnotes, 1)}
        by_place = {(c.row, c.place): c for c in self.cells}
        of_row = self._families
        apart = len(set(of_row.values()) - {""}) > 1  # then every row says of which it is
        lines: list[list[Entry]] = [
            [
                row + marks.get(row, ""),
                *([of_row[row]] if apart else []),
                *(_entry(by_place.get((row, place))) for place in columns),
            ]
            for row in order_of(c.row for c in self.cells)
            if columns == whole or any((row, place) in by_place for place in columns)
        ]
        varying = [i for i in range(3) if len({place[i] for place in columns}) > 1]
        fixed = [spoken(PLACES[i], columns[0][i]) for i in range(3) if i not in varying]
        headers = [" ".join(spoken(PLACES[i], place[i]) for i in varying) for place in columns]
        if not varying:
            headers = ["top-1"]
        title = ", ".join([self.title, *fixed])
        first = ["method", "family"] if apart else ["method"]
        return Layout(title=title, headers=[*first, *headers], lines=lines)

    def details(self) -> Layout:
        """A line for every cell that has been run."""
        lines: list[list[Entry]] = []
        for c in self.cells:
            if not c.ours:
                continue
            n = str(len(c.ours)) + (f" of {c.asked}" if len(c.ours) < c.asked else "")
            difference = "" if c.difference is None else f"{c.difference:+.1f}"
            scores = [mean_and_std(*s) for m in METRICS if (s := c.score(m))]
            lines.append([c.row, *c.place, *scores, n, _printed(c.paper), difference, c.verdict])
        headers = ["method", *PLACES, "best", "last", "n", "paper", "best - paper", "band"]
        table = Layout(title="Every cell that has been run", headers=headers, lines=lines)
        return table.kept(
            i for i, h in enumerate(headers) if h == "n" or any(line[i] for line in lines)
        )

    def orderings(self) -> Layout | None:
        """What the paper claims of two rows, and what our runs say of it."""
        lines: list[list[Entry]] = []
        for claim in self.claims:
            more, than, by = claim["more"], claim["than"], claim.get("by", 0)
            text = f"{more} > {than}" + (f" by {by:g}" if by else "")
            for place in order_of(c.place for c in self.cells):
                if any(str(claim.get(k, v)) != v for k, v in zip(PLACES, place, strict=True)):
                    continue
                here = {c.row: c for c in self.cells if c.place == place and c.ours}
                if {more, than} <= set(here):
                    found = compare(here[more].by_set, here[than].by_set)
                    alike = here[more].comparable and here[than].comparable
                    verdict = _verdict(found, by) if alike else "of another family"
                    lines.append([text, *place, str(found), verdict])
        if not lines:
            return None
        headers = ["claim", *PLACES, "difference of best, 95 %", "our runs"]
        return Layout(title="Orderings", headers=headers, lines=lines)

    def remarks_and_notes(self) -> list[str]:
        """What a reader must know of these numbers."""
        ours = [r for c in self.cells for r in c.ours]
        found = [*filter(None, [self.advice]), *self.remarks]
        found += [f"[{k}] {text}" for k, text in enumerate(self._footnotes.values(), 1)]
        if self.errata and "table" in self.errata:
            found.append(self.errata["table"])
        partly = [c for c in self.cells if c.ours and len(c.ours) < c.asked]
        if partly:
            found.append(f"{len(partly)} cells have fewer students than asked for (column n).")
        found += [*self._protocols(), *self._evaluators()]
        machines = order_of(r.machine for r in ours if r.machine)
        if machines:
            found.append(f"Machines: {'; '.join(machines)}.")
        commits = order_of(r.commit for r in ours)
        if len(commits) == 1:
            found.append(f"Students trained by commit: {commits[0]}.")
        return [*found, *notes(ours)]

    def markdown(self) -> str:
        """Everything, as a page."""
        remarks = [f"- {markdown_text(note)}" for note in self.remarks_and_notes()]
        if not self.cells:
            return "\n".join([f"**{markdown_text(self.title)}**", "", *remarks]) + "\n"
        tables = [self.matrix(), self.details(), self.orderings()]
        parts = [t.markdown() for t in tables if t is not None and t.lines]
        return "\n".join([*parts, KEY, "", *remarks]) + "\n"

    def latex(self) -> str:
        """The matrix for a paper (booktabs), remarks as comments."""
        remarks = [f"% {one_line(note)}\n" for note in [KEY, *self.remarks_and_notes()]]
        return "".join(remarks) + self.matrix().latex()

    def csv(self) -> str:
        """A line per cell, run or not."""
        return csv_text(self.records())

    def records(self) -> list[dict[str, Any]]:
        """Every cell's numbers; None where there are none. `note`: erratum and remarks."""
        remarks = list(self.remarks)
        errata = self.errata or {}
        return [
            _record(c) | {"note": " ".join([*filter(None, [errata.get(c.row)]), *remarks]) or None}
            for c in self.cells
        ]

    @property
    def _footnotes(self) -> dict[str, str]:
        return {row: text for row, text in (self.errata or {}).items() if row != "table"}

    @property
    def _families(self) -> dict[str, str]:
        """The evaluator family of each row: the paper's, and ours where it is another."""
        words = dict.fromkeys((c.row for c in self.cells), "")
        for c in self.cells:
            paper, ours = (c.family if c.paper else None), (c.our_family if c.ours else None)
            if paper and c.ours and not c.comparable:
                words[c.row] = f"{paper}; ours {ours or 'none'}"
            else:
                words[c.row] = words[c.row] or paper or ours or ""
        return words

    def _evaluators(self) -> list[str]:
        """Of which families the printed numbers are, and what was therefore not compared."""
        printed = order_of(c.family for c in self.cells if c.paper and c.family)
        found = [f"Printed under {f}: {self.families[f]}." for f in printed if f in self.families]
        apart = [c for c in self.cells if c.paper and c.ours and not c.comparable]
        for c in {(c.row, c.family, c.our_family): c for c in apart}.values():
            found.append(
                f"Row {c.row}: the paper's numbers are of the evaluator family {c.family}, ours of "
                f"{c.our_family or 'none'}; they are not compared."
            )
        return found

    def _protocols(self) -> list[str]:
        """How our runs were scored, and where one row mixes them."""
        by_row: dict[str, set[str]] = {}
        for c in self.cells:
            by_row.setdefault(c.row, set()).update(r.protocol for r in c.ours)
        protocols = ", ".join(order_of(r.protocol for c in self.cells for r in c.ours))
        if any(len(found) > 1 for found in by_row.values()):
            return [f"Warning: several protocols stand in one row: {protocols}."]
        return [f"Our runs' protocol: {protocols}."] if protocols else []


def _verdict(found: Difference, by: float) -> str:
    """Does a difference bear out a claim of more than `by`?"""
    if found.low is None or found.high is None:
        return "needs more seeds"
    if found.low > by:
        return "holds"
    return "does not hold" if found.high < by else "not established"


def _record(c: TableCell) -> dict[str, Any]:
    ours = {}
    for metric in METRICS:
        values = c.score(metric) or (None, None)
        for what, value in zip(("mean", "std"), values, strict=True):
            name = f"ours_{metric.removeprefix('top1_')}_{what}"
            ours[name] = None if value is None else round(value, 2)
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
        "family": c.family if c.paper else None,
        "our_family": c.our_family if c.ours else None,
        "protocol": ", ".join(order_of(r.protocol for r in c.ours)) or None,
        "commit": ", ".join(order_of(r.commit for r in c.ours)) or None,
        "command": c.command,
        "folder": "; ".join(c.folders) or None,
    }


def _entry(cell: TableCell | None) -> Entry:
    """Ours, the paper's, or both."""
    if cell is None:
        return ""
    best = cell.score("top1_best")
    ours = (Span(mean_and_std(*best), "ours"), Span(f" ({len(cell.ours)})")) if best else ()
    paper = (Span(_printed(cell.paper), "paper"),) if cell.paper else ()
    between = (Span(" / "),) if ours and paper else ()
    return (*ours, *between, *paper)


def _printed(score: tuple[float, float | None] | None) -> str:
    """The paper's number; some have no spread beside them."""
    if score is None:
        return ""
    mean, std = score
    return f"{mean:.1f}" if std is None else mean_and_std(mean, std)

"""A table ready to print: typed entries, and one renderer for every place that prints them.

Text is data everywhere: what a place would read as its own marks is escaped there. `spans` is what
the HTML templates print.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.text import Text

from eval.results.fitted import FittedTable
from mgd3.runtime.text import markdown_text, one_line

Style = Literal["plain", "ours", "paper"]

NONE = "–"  # a spread that one value has not, or that cannot be estimated
PLACE = ("dataset", "ipc", "protocol", "student")  # where accuracies compare
_MARKDOWN = {"plain": "{}", "ours": "**{}**", "paper": "*{}*"}
_TERMINAL = {"plain": "", "ours": "bold", "paper": "italic"}
_LATEX = {"plain": "{}", "ours": r"\textbf{{{}}}", "paper": r"\textit{{{}}}"}

_LATEX_MARKS = str.maketrans(
    {
        **{mark: f"\\{mark}" for mark in "&%_#${}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "<": "$<$",
        ">": "$>$",
    }
)


@dataclass(frozen=True)
class Span:
    """A piece of an entry: a number of ours, one that the paper printed, or neither."""

    text: str
    style: Style = "plain"


Entry = str | tuple[Span, ...]


def spans(entry: Entry) -> tuple[Span, ...]:
    """An entry's pieces; text is a plain one."""
    return (Span(entry),) if isinstance(entry, str) else entry


def plain(entry: Entry) -> str:
    """An entry's text, whosever its numbers are."""
    return "".join(span.text for span in spans(entry))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table ready to print: what all cells share stands in the title, not in columns."""

    title: str
    headers: Sequence[str]
    lines: Sequence[Sequence[Entry]]

    @classmethod
    def of_columns(cls, title: str, columns: Mapping[str, Sequence[Entry]]) -> Layout:
        """A table from its columns."""
        lines = [list(line) for line in zip(*columns.values(), strict=True)]
        return cls(title=title, headers=list(columns), lines=lines)

    def kept(self, columns: Iterable[int]) -> Layout:
        """The table with some of its columns, by position."""
        shown = list(columns)
        return Layout(
            title=self.title,
            headers=[self.headers[k] for k in shown],
            lines=[[line[k] for k in shown] for line in self.lines],
        )

    def with_column(self, header: str, entries: Sequence[Entry]) -> Layout:
        """The table with one more column."""
        lines = [[*line, entry] for line, entry in zip(self.lines, entries, strict=True)]
        return Layout(title=self.title, headers=[*self.headers, header], lines=lines)

    def texts(self) -> list[list[str]]:
        """The lines' plain text, for a tracker."""
        return [[plain(entry) for entry in line] for line in self.lines]

    def markdown(self) -> str:
        """Title and table."""
        lines = [[_markdown(entry) for entry in line] for line in self._all_lines]
        lines.insert(1, ["---"] * len(self.headers))
        body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return f"**{_markdown(self.title)}**\n\n{body}\n"

    def for_terminal(self) -> FittedTable:
        """The same for a terminal; a narrow one folds cells rather than cut them."""
        title = Text(one_line(self.title), style="table.title")
        lines = [
            [
                Text.assemble(*((one_line(s.text), _TERMINAL[s.style]) for s in spans(entry)))
                for entry in line
            ]
            for line in self.lines
        ]
        return FittedTable(title, [Text(one_line(header)) for header in self.headers], lines)

    def latex(self) -> str:
        """The table without its title, for a paper (booktabs)."""
        rows = [" & ".join(map(_latex, line)) + r" \\" for line in self._all_lines]
        # behind \\ and rules a bracket or a star would be an option of theirs
        rows = [f"{{}}{row}" if row.startswith(("[", "*")) else row for row in rows]
        lines = [
            rf"\begin{{tabular}}{{l{'c' * (len(self.headers) - 1)}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
        ]
        return "\n".join(lines) + "\n"

    @property
    def _all_lines(self) -> list[Sequence[Entry]]:
        return [self.headers, *self.lines]


def folded(title: str, columns: Mapping[str, Sequence[Entry]]) -> Layout:
    """Columns as a table; a place that all lines share moves to the title."""
    shared = [k for k in PLACE if len(set(columns[k])) == 1]
    parts = [title, *(spoken(k, plain(columns[k][0])) for k in shared)]
    kept = {k: entries for k, entries in columns.items() if k not in shared}
    return Layout.of_columns(", ".join(filter(None, parts)), kept)


def mean_and_std(mean: float, std: float | None) -> str:
    """Percents as the papers print them; one value has no spread."""
    return f"{mean:.1f} ± {NONE if std is None else format(std, '.1f')}"


def spoken(place: str, value: str) -> str:
    """A dataset's, protocol's or student's name says what it is; an IPC does not."""
    return f"ipc {value}" if place == "ipc" else value


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV; text that a spreadsheet would run as a formula gets an apostrophe."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in r.items()} for r in records)
    return buffer.getvalue()


def _markdown(entry: Entry) -> str:
    return "".join(_MARKDOWN[s.style].format(markdown_text(s.text)) for s in spans(entry))


def _latex(entry: Entry) -> str:
    return "".join(
        _LATEX[s.style].format(one_line(s.text).translate(_LATEX_MARKS)) for s in spans(entry)
    )


def _inert(value: Any) -> Any:
    value = one_line(value) if isinstance(value, str) else value
    if not isinstance(value, str) or not value.startswith(tuple("=+-@")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value

"""A terminal's table that breaks lines between words for as long as it can."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text


class FittedTable(Table):
    """Where a table is too wide, room goes to whole words first: of cells, then of headers.

    Rich alone takes room from the widest columns, and breaks the names there inside their words.
    Where not even the cells' words have room, it still does.
    """

    def __init__(
        self, title: Text, headers: Sequence[Text], lines: Sequence[Sequence[Text]]
    ) -> None:
        super().__init__(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for header in headers:
            self.add_column(header, overflow="fold")
        for line in lines:
            self.add_row(*line)
        columns = list(zip(*lines, strict=True)) if lines else [()] * len(headers)
        words = [max(map(_longest_word, column), default=1) for column in columns]
        headings = [max(w, _longest_word(h)) for w, h in zip(words, headers, strict=True)]
        whole = [max(map(_width, column), default=1) for column in columns]
        full = [max(w, _width(h)) for w, h in zip(whole, headers, strict=True)]
        self._needs = [
            words,
            headings,
            [max(pair) for pair in zip(headings, whole, strict=True)],
            full,
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines, in the width that there is."""
        frame = 2 * len(self.columns) + 1  # an edge each, a rule between columns, a space in each
        widths = shared_out(options.max_width - frame, self._needs)
        if widths is None:
            return super().__rich_console__(console, options)
        fitted = copy.copy(self)
        fitted.columns = [copy.copy(column) for column in self.columns]
        for column, width in zip(fitted.columns, widths, strict=True):
            column.width = width
        return Table.__rich_console__(fitted, console, options)


def shared_out(room: int, needs: Sequence[Sequence[int]]) -> list[int] | None:
    """Widths of columns whose sum is at most `room`; None where the first needs are too much.

    Each of `needs` is a width for each column, more from one to the next. They are met in turn;
    where not all of one can be, the columns that lack least come first.
    """
    widths = list(needs[0])
    left = room - sum(widths)
    if left < 0:
        return None
    for wanted in needs[1:]:
        lacking = [max(0, more - width) for more, width in zip(wanted, widths, strict=True)]
        for k in sorted(range(len(widths)), key=lacking.__getitem__):
            given = min(lacking[k], left)
            widths[k] += given
            left -= given
    return widths


def _longest_word(text: Text) -> int:
    return max((cell_len(word) for word in text.plain.split()), default=1)


def _width(text: Text) -> int:
    return max(1, cell_len(text.plain))

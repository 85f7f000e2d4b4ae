"""What a terminal shows: log lines, and below them one live bar per stage that is under way."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from mgd3.runtime.text import shortened

_BAR, _NARROW_BAR = 20, 12  # characters; the second below
_WIDE = 100  # columns
_LEAST_NAME = 16  # of a bar's name, before its note is cut
_live: Progress | None = None
_hidden = False


def hide_progress() -> None:
    """No more bars from this process: one of several that do the same."""
    global _hidden
    _hidden = True


def has_terminal() -> bool:
    """Is there a terminal that bars of this process may stand on?"""
    return not _hidden and Console(stderr=True).is_terminal


class ScreenHandler(logging.Handler):
    """Log lines on standard output, whole and above the live bars where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, or the lines of a traceback."""
        try:
            line = self.format(record)
            if _live is not None and sys.stdout.isatty():
                _live.console.print(line, soft_wrap=True, markup=False, highlight=False)
            else:
                print(line, flush=True)
        except Exception:  # as every handler of logging: a closed pipe stops no training
            self.handleError(record)


class _Line(ProgressColumn):
    """Name, bar, count, rate, time left and note in one line, whatever the terminal's width.

    A long name is cut in its middle, a long note at its end.
    """

    max_refresh = 0.1

    def render(self, task: Task) -> Text:
        """The line of one stage."""
        width = console.width - 1 if (console := _console()) else 79
        side = _BAR if width >= _WIDE else _NARROW_BAR
        count, note = task.fields["count"], task.fields["note"]
        behind = "  ".join(part for part in (count, note) if part)
        behind = shortened(behind, max(len(count), width - _LEAST_NAME - side - 3), at_end=True)
        name = shortened(task.description, max(_LEAST_NAME, width - side - 3 - len(behind)))
        filled = round(side * min(1.0, max(0.0, task.completed / (task.total or 1))))
        bar = ("━" * filled, "bar.complete"), ("━" * (side - filled), "bar.back")
        return Text.assemble(f"{name} ", *bar, f" {behind}", no_wrap=True, overflow="crop")


def _console() -> Console | None:
    return _live.console if _live is not None else None


@contextmanager
def live() -> Iterator[Progress]:
    """The bars of this process, gone once the outermost block ends."""
    global _live
    if _live is not None:
        yield _live
        return
    console = Console(stderr=True)
    out = sys.stdout.isatty()  # else what is printed belongs into a file, not between the bars
    with Progress(_Line(), console=console, transient=True, redirect_stdout=out) as bars:
        _live = bars
        try:
            yield bars
        finally:
            _live = None

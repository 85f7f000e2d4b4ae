"""What a terminal shows: log lines, and below them one live bar per stage that is under way.

Processes that a sweep's launcher has started show nothing: their lines are in their runs' folders.
How a run ends they tell through a file that the environment names, which every child inherits.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

from mgd3.runtime.text import shortened

_BAR, _NARROW_BAR = 20, 12  # characters; the second below
_WIDE = 100  # columns
_LEAST_NAME = 16  # of a bar's name, before its note is cut
_TOLD = "MGD3_FINISHED_RUNS"
_live: Progress | None = None
_hidden = False


def hide_progress() -> None:
    """No more bars from this process: one of several that do the same."""
    global _hidden
    _hidden = True


def has_terminal() -> bool:
    """Is there a terminal that bars of this process may stand on?"""
    return not (_hidden or is_launched()) and Console(stderr=True).is_terminal


def is_launched() -> bool:
    """Is this a process of a sweep, with the screen in other hands?"""
    return multiprocessing.parent_process() is not None and _TOLD in os.environ


class ScreenHandler(logging.Handler):
    """Log lines on standard output, whole and above the live bars where there are any."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, or the lines of a traceback."""
        if is_launched():
            return
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


def tell(run: str, error: str = "") -> None:
    """Say to whoever follows the sweep that a run has ended, and of what it failed."""
    if path := os.environ.get(_TOLD):
        with suppress(OSError), open(path, "a") as file:  # a bar that stands still stops no run
            file.write(json.dumps([run, error]) + "\n")


@contextmanager
def listening() -> Iterator[Path]:
    """A file that child processes of the block write a line into for each run."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "finished")
        path.touch()
        os.environ[_TOLD] = str(path)
        try:
            yield path
        finally:
            del os.environ[_TOLD]

"""Progress bars with rate and time left; a plain line now and then where there is no terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

log = logging.getLogger(__name__)
T = TypeVar("T")
_QUIET_SECONDS = 30.0
_hidden = False


def hide_progress() -> None:
    """No more bars from this process: one of several that do the same."""
    global _hidden
    _hidden = True


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")`; the note stands beside the bar."""
    console = Console(stderr=True)
    if console.is_terminal and not _hidden:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(description, total=total, note="")

            def advance(n: int = 1, note: str = "") -> None:
                bar.update(task, advance=n, note=note)

            yield advance
        return

    start = last = time.monotonic()
    done = 0

    def advance_log(n: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += n
        now = time.monotonic()
        if now - last >= _QUIET_SECONDS and done < total:
            last = now
            rate = done / (now - start)
            left = (total - done) / rate
            log.info(
                "%s: %d/%d, %.1f/s, %.0f s left %s", description, done, total, rate, left, note
            )

    yield advance_log
    log.info("%s: %d in %.1f s", description, done, time.monotonic() - start)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """`items` with a bar."""
    with progress(description, total) as advance:
        for item in items:
            yield item
            advance()

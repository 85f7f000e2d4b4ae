"""How far a stage is: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from mgd3.runtime.screen import has_terminal, live
from mgd3.runtime.stages import WORTH_SAYING, Stage, duration

log = logging.getLogger(__name__)
T = TypeVar("T")

_QUIET_SECONDS = 30.0  # between two lines where there is no terminal, or
_QUIET_SHARE = 0.02  # this share of the whole
_JUDGED_AFTER = 3.0  # seconds of work that a guess rests on
_WORTH_A_LINE = 1.0  # seconds: what was faster leaves no line
_WRONG = 2.0  # factor from which on an estimate is corrected


class Pace(Protocol):
    """Where it is kept how fast some kind of work goes on this machine."""

    def add(self, amount: float, seconds: float) -> None:
        """So much of it took so long."""


class Count:
    """Units done, and how fast: a resumed stage's rate is that of what is done now.

    `compiles`: the first unit takes torch.compile's minute besides, and counts for no rate.
    """

    def __init__(self, total: float, done: float, unit: str, compiles: bool = False) -> None:
        self.total, self.begun, self.done, self.unit = total, done, done, unit
        self._begun = self._start = time.monotonic()
        self._rated_from, self._compiles = done, compiles

    def add(self, n: float) -> None:
        """So many more are done."""
        self.done += n
        if self._compiles:
            self._compiles, self._rated_from, self._start = False, self.done, time.monotonic()

    @property
    def all_seconds(self) -> float:
        """Since this process began with it."""
        return time.monotonic() - self._begun

    @property
    def elapsed(self) -> float:
        """Seconds that a rate is judged by."""
        return time.monotonic() - self._start

    @property
    def made(self) -> float:
        """Units that this process has done in them."""
        return self.done - self._rated_from

    @property
    def left(self) -> float | None:
        """Seconds, at the rate so far; None before the first unit."""
        return (self.total - self.done) * self.elapsed / self.made if self.made > 0 else None

    @property
    def rate(self) -> str:
        """Units a second, or seconds a unit where that is the larger number."""
        if self.made <= 0:
            return ""
        rate = self.made / max(self.elapsed, 1e-9)
        return f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"

    def __str__(self) -> str:
        parts = [f"{int(self.done):,}/{int(self.total):,} {self.unit}".rstrip(), self.rate]
        if self.left is not None:
            parts.append(f"{duration(self.left)} left")
        return ", ".join(part for part in parts if part)


@contextmanager
def progress(
    description: str,
    total: float,
    unit: str = "",
    done: float = 0,
    stage: Stage | None = None,
    pace: Pace | None = None,
    compiles: bool = False,
) -> Iterator[Callable[..., None]]:
    """Yields `advance(n=1, note="")`; the note stands beside the bar.

    `done` of `total` units were there before, and count for no rate. `stage` is what was said
    of it before: the first seconds correct that where it was wrong, or said nothing. `pace` learns
    how fast it went, without a first unit that `compiles`.
    """
    count, judged = Count(total, done, unit, compiles), False
    with _bar(description, count) if has_terminal() else _lines(description, count) as show:

        def advance(n: float = 1, note: str = "") -> None:
            nonlocal judged
            count.add(n)
            if not judged and count.elapsed >= _JUDGED_AFTER and count.made > 0:
                judged = True
                _judge(description, count, stage)
            show(note)

        yield advance
    if count.made > 0 and pace is not None:
        pace.add(count.made, count.elapsed)
    level = logging.INFO if count.all_seconds >= _WORTH_A_LINE else logging.DEBUG
    before = f" (and {int(count.begun):,} before)" if count.begun else ""
    amount = f"{round(count.done - count.begun):,} {unit}".rstrip()
    log.log(level, "%s: %s in %.1f s%s", description, amount, count.all_seconds, before)


def _judge(description: str, count: Count, stage: Stage | None) -> None:
    """Say how long it takes by the first of it, where that was not known or known wrongly."""
    left, said = count.left or 0.0, stage.seconds if stage else None
    right = said is not None and said / _WRONG <= left + count.elapsed <= said * _WRONG
    shorter = f"; {stage.shorter} shortens it" if stage and stage.shorter else ""
    shown = has_terminal() and not shorter  # by the bar
    if right or shown or max(left, said or 0.0) < WORTH_SAYING:
        return
    message = "%s: about %s left, judged by its first %s (a guess)%s"
    log.info(message, description, duration(left), duration(count.elapsed), shorter)


@contextmanager
def _bar(description: str, count: Count) -> Iterator[Callable[[str], None]]:
    with live() as bars:
        task = bars.add_task(description, total=count.total, count=str(count), note="")

        def show(note: str) -> None:
            bars.update(task, completed=count.done, count=str(count), note=note)

        try:
            yield show
        finally:
            bars.remove_task(task)


@contextmanager
def _lines(description: str, count: Count) -> Iterator[Callable[[str], None]]:
    last = 0.0  # seconds

    def show(note: str) -> None:
        nonlocal last
        elapsed, left = count.all_seconds, count.left or 0.0
        if elapsed - last >= max(_QUIET_SECONDS, _QUIET_SHARE * (elapsed + left)):
            last = elapsed
            if count.done < count.total:
                log.info("%s: %s%s", description, str(count), f"  {note}" if note else "")

    yield show


def track(items: Iterable[T], description: str, total: int, unit: str = "") -> Iterator[T]:
    """`items` with a bar."""
    with progress(description, total, unit) as advance:
        for item in items:
            yield item
            advance()

"""Ctrl-C and SIGTERM (SLURM's preemption): a checkpoint first, then a sentence, no traceback."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_received = 0  # the signal that came last
_held = False  # does somebody end a step first?


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end; it exits with 128 + `signal`, as shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {_NAMES.get(signal.Signals(number), number)}")
        self.signal = number


def listen() -> None:
    """Turn both signals into `Stopped`; call it before the imports that take seconds."""
    global _received
    _received = 0
    sys.excepthook = _in_a_sentence
    with suppress(ValueError):  # not the main thread: whoever owns it listens
        for number in _NAMES:
            signal.signal(number, _stop)


def received() -> int:
    """The signal that came last, 0 if there was none."""
    return _received


@contextmanager
def held() -> Iterator[Callable[[], bool]]:
    """Inside, the first signal waits until a step is whole: the value says whether one came.

    Leaving the block raises it; a second signal does not wait.
    """
    global _held
    outer, _held = _held, True
    try:
        yield lambda: _received != 0
    finally:
        _held = outer
    if _received and not _held:
        raise Stopped(_received)


def _stop(number: int, frame: FrameType | None) -> None:
    global _received
    first, _received = not _received, number
    if not (_held and first):
        raise Stopped(number)


def _in_a_sentence(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """The last hook before Python prints a traceback."""
    if not isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    number = error.signal if isinstance(error, Stopped) else signal.SIGINT
    print(f"error: {Stopped(number)} before anything was done", file=sys.stderr, flush=True)
    os._exit(128 + number)

"""What would cost time on a GPU: where the host waits, and what crosses between host and device."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = tuple(str(ROOT / name) for name in ("mgd3", "eval", "scripts"))
ELSEWHERE = "elsewhere"  # such as autograd's own thread: no line of ours is on its stack


@dataclass
class Counts:
    """Events by what happened and the line of ours that made it happen.

    A wait is what stops the host until the device has finished: a value that is read, a size that
    only the device knows, and every copy that is not `non_blocking` (CUDA synchronises after
    copies from and to ordinary memory). `expanded` are copies of host tensors whose stride of 0,
    or whose broadcasting, is written out on the host first.
    """

    waits: Counter = field(default_factory=Counter)  # (what, line)
    copies: Counter = field(default_factory=Counter)  # (direction, line)
    bytes: Counter = field(default_factory=Counter)  # (direction, line)
    expanded: Counter = field(default_factory=Counter)  # line: bytes
    marks: list[Counts] = field(default_factory=list)  # what had been counted at some moments

    def mark(self) -> None:
        """A step begins."""
        self.marks.append(Counts(self.waits.copy(), self.copies.copy(), self.bytes.copy()))

    def waited(self, what: str) -> None:
        self.waits[what, line()] += 1

    def copied(self, direction: str, size: int, blocking: bool, expanded: bool = False) -> None:
        where = line()
        self.copies[direction, where] += 1
        self.bytes[direction, where] += size
        if blocking:
            self.waits[f"copy {direction}", where] += 1
        if expanded:
            self.expanded[where] += size

    def bytes_by_line(self, direction: str) -> Counter:
        """Bytes that went one way."""
        return Counter({line: n for (way, line), n in self.bytes.items() if way == direction})


_now = [Counts()]


def counts() -> Counts:
    """Where events are counted now."""
    return _now[-1]


@contextmanager
def counting():
    """Counts of what happens inside the block, on any thread."""
    _now.append(Counts())
    try:
        yield _now[-1]
    finally:
        _now.pop()


def line() -> str:
    """File and line of the innermost frame of ours."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGES):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return ELSEWHERE

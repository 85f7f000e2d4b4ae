"""How long each stage of a run took, and how fast this machine does one kind of work."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from mgd3.runtime.machine import machine_name
from mgd3.storage.documents import Number, remembered
from mgd3.storage.files import remember, write_json

_TIMED = 0.5  # seconds of work below which a rate says nothing


class StageTimes:
    """Seconds by stage, kept in a JSON file; resumptions add up, what was killed counts nothing."""

    def __init__(self, path: Path, keep: bool = True) -> None:
        """`keep` False writes nothing: for a process beside the one that does."""
        self.path = path
        self.keep = keep
        self._gathered: dict[str, float] | None = None

    def read(self) -> dict[str, float]:
        """Seconds by stage; empty before the first stage ends."""
        return remembered(self.path, dict[str, Number])

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of this block to stage `name`, also if it ends in an error."""
        start = time.monotonic()
        try:
            yield
        finally:
            taken = round(time.monotonic() - start, 3)
            if self._gathered is not None:
                self._gathered[name] = self._gathered.get(name, 0.0) + taken
            else:
                self._add({name: taken})

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Stages that come and go inside, class by class, are written once, when the block ends."""
        self._gathered = {}
        try:
            yield
        finally:
            gathered, self._gathered = self._gathered, None
            self._add(gathered)

    def _add(self, taken: Mapping[str, float]) -> None:
        new = {name: s for name, s in taken.items() if s}  # a stage that does nothing is none
        if new and self.keep:
            seconds = self.read()
            write_json(
                self.path,
                seconds | {name: round(seconds.get(name, 0.0) + s, 3) for name, s in new.items()},
            )


class WorkPace:
    """Seconds that one unit of some kind of work takes here, as it took last; kept in the cache."""

    def __init__(self, cache: Path, kind: str, device: torch.device, each: float = 1.0) -> None:
        """`kind` says all that the speed depends on; a bar's unit is `each` units of it."""
        where = f"{machine_name(device)}, {torch.get_num_threads()} threads"
        digest = hashlib.blake2s(f"{kind}\n{where}".encode(), digest_size=8).hexdigest()
        self.path = cache / "pace" / f"{digest}.json"
        self._said = {"work": kind, "machine": where}
        self._each = each

    @property
    def seconds(self) -> float | None:
        """Of one unit of the bar; None: never timed on this machine."""
        found = remembered(self.path, dict[str, Number | str]).get("seconds")
        return float(found) * self._each if isinstance(found, int | float) else None

    def add(self, amount: float, seconds: float) -> None:
        """So many units of the bar took so long; what was too short to tell is not kept."""
        if seconds >= _TIMED:
            per_unit = seconds / amount / self._each
            remember(self.path, {**self._said, "seconds": per_unit})

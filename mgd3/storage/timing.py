"""How long each stage of a run took; resumptions add up, what was killed counts nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mgd3.storage.documents import Number, remembered
from mgd3.storage.files import write_json


class StageTimes:
    """Seconds by stage, kept in a JSON file."""

    def __init__(self, path: Path, keep: bool = True) -> None:
        """`keep` False writes nothing: for a process beside the one that does."""
        self.path = path
        self.keep = keep

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
            if taken and self.keep:  # a stage that does nothing is none
                seconds = self.read()
                seconds[name] = round(seconds.get(name, 0.0) + taken, 3)
                write_json(self.path, seconds)

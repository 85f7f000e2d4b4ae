"""What a part of a run does, how long it takes here, what shortens it: said before it begins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

log = logging.getLogger(__name__)

WORTH_SAYING = 60.0  # seconds from which on a stage is announced


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a run that is still to do, or is there."""

    what: str  # such as «trains resnetap10 on 600 real images for 300 epochs»
    seconds: float | None = None  # on this machine; None: nothing says how long yet
    guess: str = ""  # what the seconds are judged by, where such work was never timed here
    shorter: str = ""  # keys that shorten it
    there: bool = False

    @property
    def time(self) -> str:
        """How long it takes, in words."""
        if self.seconds is None:
            return "never timed on this machine"
        return f"about {duration(self.seconds)} here" + (f" ({self.guess})" if self.guess else "")

    def __str__(self) -> str:
        if self.there:
            return self.what
        shorter = f"; {self.shorter} shortens it" if self.shorter else ""
        return f"{self.what}: {self.time}{shorter}"


def stages_of(part: object, *arguments: object) -> list[Stage]:
    """What a part that may have `stages` would do, such as a guidance, a start, features."""
    stages: Callable[..., list[Stage]] | None = getattr(part, "stages", None)
    return [] if stages is None else stages(*arguments)


def announce(stage: Stage) -> None:
    """Say what comes, where it takes a minute or more."""
    if not stage.there and (stage.seconds or 0.0) >= WORTH_SAYING:
        log.info("%s", stage)


def total_seconds(stages: Sequence[Stage]) -> tuple[float, bool]:
    """Seconds of all that is to do, and whether some of it was never timed."""
    left = [stage.seconds for stage in stages if not stage.there]
    return sum(s for s in left if s is not None), None in left


def duration(seconds: float) -> str:
    """Seconds as a reader wants them: 45 s, 12 min, 8.1 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Two commands at once in one folder: what they leave is what one after the other leaves."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from campaign.processes import (
    Finished,
    Outcome,
    at_once,
    content,
    differences,
    together,
)
from campaign.stages import (
    BACKBONE,
    FEATURES,
    FEW_STEPS,
    FINE_TUNING,
    QUICK,
    SMALL,
    SOFT,
    STAGES,
    TEACHER,
    TWO_CLASSES,
    Prepared,
    Stage,
    prepared,
)

WHAT, RIGHT = "races", "ended right"

_REFUSAL = "another process is running this very configuration"
_LATER = (0.0, 0.25)  # seconds that the second one starts after the first
_KILLED_AFTER = (0.5, 0.8, 1.1)
_NAMED = {stage.name: stage for stage in STAGES}
_CACHED = (*QUICK, *TWO_CLASSES, *FEW_STEPS)


@dataclass(frozen=True)
class Race:
    """Two commands: a stage's, each with overrides of its own.

    With `refused` one of them may decline, since it is the other's very run.
    """

    name: str
    stage: Stage
    one: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    refused: bool = False


RACES = (
    Race("the same run", Stage("run", SMALL), refused=True),
    Race("the same sweep", Stage("sweep", ("-m", *_CACHED)), ("seed=0,1",), ("seed=0,1",)),
    Race(
        "sweeps that share a set",
        Stage("sweeps", ("-m", *_CACHED)),
        ("method=random,mgd3",),
        ("method=mgd3,closest_real",),
    ),
    Race(
        "two students of one set",
        Stage("students", ("-m", *QUICK[:3], *QUICK[4:], *TWO_CLASSES, *FEW_STEPS)),
        ("students=[convnet2_w8]",),
        ("students=[convnet2_w12]",),
    ),
    Race(
        "two protocols of one set",
        Stage("protocols", _CACHED),
        ("protocol.epochs_by_ipc=[[null,3]]",),
        ("protocol.epochs_by_ipc=[[null,4]]",),
    ),
    Race("latents and modes", Stage("seeds", _CACHED), ("seed=0",), ("seed=1",)),
    Race("a teacher", Stage("teacher", SOFT), ("seed=0",), ("seed=1",)),
    Race(
        "a teacher's answers",
        Stage("answers", SOFT),
        ("protocol.answers.temperature=10",),
        ("protocol.answers.temperature=20",),
    ),
    Race(
        "a feature network",
        Stage("features", (*QUICK[1:], *TWO_CLASSES, "method=herding", *FEATURES)),
        ("ipc=2",),
        ("ipc=3",),
    ),
    Race("fine-tuned weights", Stage("tuning", FINE_TUNING), ("seed=0",), ("seed=1",)),
    Race("train_teacher", Stage("teacher", TEACHER, "scripts/train_teacher.py")),
    Race("train_backbone", Stage("backbone", BACKBONE, "scripts/train_backbone.py"), refused=True),
    Race("fetch_weights", _NAMED["fetch_weights"]),
    Race("evaluate", _NAMED["evaluate"], refused=True),
    Race("report", _NAMED["report"]),
    Race("reproduce", _NAMED["reproduce"]),
    Race("inventories", _NAMED["dataset=folder"], ("method=random",), ("method=mgd3",)),
)
_QUICK = ("train_teacher",)
_KILLED = ("latents and modes", "a teacher", "fine-tuned weights", "two protocols of one set")


def outcomes(work: Path, quick: bool, workers: int) -> Iterator[Outcome]:
    """Each race, begun at once and a little apart; some with one of the two killed on its way."""
    races = [race for race in RACES if not quick or race.name in _QUICK]
    later, killed_after = (_LATER[:1], ()) if quick else (_LATER, _KILLED_AFTER)
    for found in at_once(
        (partial(_all_of, race, work / race.name, later, killed_after) for race in races),
        max(1, workers // 2),  # each is two processes
    ):
        yield from found


def _all_of(
    race: Race, work: Path, later: Sequence[float], killed_after: Sequence[float]
) -> list[Outcome]:
    ready = prepared(race.stage, work / "inputs")
    cwd = ready.folder(work / "in turn")
    for one in (race.one, race.other):
        done = ready.run(cwd, more=one)
        if done.returncode != 0:
            return [Outcome(f"{race.name}, in turn", False, done.last_words)]
    expected = content(cwd)
    found = [_raced(race, ready, work / f"later-{s}", expected, s, None) for s in later]
    if race.name in _KILLED:
        found += [
            _raced(race, ready, work / f"killed-{s}", expected, 0, s) for s in killed_after
        ]  # fmt: skip
    return found


def _raced(
    race: Race,
    ready: Prepared,
    cwd: Path,
    expected: dict[str, str],
    later: float,
    killed_after: float | None,
) -> Outcome:
    name = race.name + (f", {later:g} s later" if later else ", at once")
    if killed_after is not None:
        name = f"{race.name}, one killed after {killed_after:g} s"
    ready.folder(cwd)

    def second() -> Finished:
        time.sleep(later)
        return ready.run(cwd, more=race.other)

    first, other = together(partial(ready.run, cwd, more=race.one, kill_after=killed_after), second)
    if killed_after is not None:
        first = ready.run(cwd, more=race.one)
    wrong = [done.last_words or str(done.returncode) for done in (first, other)
             if done.returncode != 0 and not (race.refused and _declined(done))]  # fmt: skip
    if race.refused and _declined(first) and _declined(other):
        wrong.append("both declined")
    if left := differences(cwd, expected):
        wrong.append(left)
    if not wrong:
        shutil.rmtree(cwd)
    return Outcome(name, not wrong, "; ".join(wrong))


def _declined(done: Finished) -> bool:
    """Did it end with the documented line, and nothing else?"""
    return done.returncode == 1 and _REFUSAL in done.stderr and "Traceback" not in done.stderr

"""Every kind of work, killed before one of its changes of the file system and run again."""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from campaign.processes import Outcome, at_once, content, differences
from campaign.stages import STAGES, Prepared, Stage, prepared

WHAT, RIGHT = "kills", "gave the same bytes"

_SECONDS = 250.0  # for all of them, with what precedes
_QUICK = ("mgd3, two students", "soft labels, stored answers", "dataset=folder", "evaluate")
_COST = 1.4  # of a kill and the run after it, in whole runs


@dataclass(frozen=True)
class Whole:
    """A stage that has run through once."""

    prepared: Prepared
    expected: dict[str, str]
    changes: int
    seconds: float
    outcome: Outcome

    @property
    def name(self) -> str:
        """The stage's."""
        return self.prepared.stage.name


def outcomes(work: Path, quick: bool, workers: int) -> Iterator[Outcome]:
    """Run every stage whole, then killed at as many of its changes as time allows."""
    began = time.monotonic()
    stages = [s for s in STAGES if not quick or s.name in _QUICK]
    wholes = list(at_once((partial(_whole, s, work / s.folder) for s in stages), workers))
    yield from (whole.outcome for whole in wholes if not whole.outcome.good)
    wholes = [whole for whole in wholes if whole.outcome.good]
    left = (_SECONDS - (time.monotonic() - began)) * workers
    chosen = {whole.name: [whole.changes // 2] for whole in wholes}
    if not quick:
        chosen = _chosen(wholes, left)
    tasks = [partial(_killed, whole, k, work / whole.prepared.stage.folder) for whole in wholes
             for k in chosen[whole.name]]  # fmt: skip
    yield from at_once(tasks, workers)


def _whole(stage: Stage, work: Path) -> Whole:
    ready = prepared(stage, work / "inputs")
    cwd = ready.folder(work / "whole")
    began = time.monotonic()
    done = ready.run(cwd, kill_at=0)
    seconds = time.monotonic() - began
    expected = content(cwd)
    wrong = done.last_words if done.returncode != 0 else differences(cwd, expected)
    outcome = Outcome(f"{stage.name}, undisturbed", not wrong, wrong)
    return Whole(ready, expected, done.changes, seconds, outcome)


def _chosen(wholes: list[Whole], seconds: float) -> dict[str, list[int]]:
    """Changes to kill at by stage: all, or evenly spread ones where time is too short for all."""
    chosen, left = {}, seconds
    by_cost = sorted(wholes, key=lambda w: w.changes * w.seconds)
    for number, whole in enumerate(by_cost):
        each = _COST * whole.seconds
        most = int(left / (len(by_cost) - number) / each)
        count = max(1, min(whole.changes, most))
        gap = (whole.changes - 1) / max(1, count - 1)
        chosen[whole.name] = sorted({1 + round(i * gap) for i in range(count)})
        left -= count * each
    return chosen


def _killed(whole: Whole, k: int, work: Path) -> Outcome:
    ready, name = whole.prepared, f"{whole.name}, killed at change {k} of {whole.changes}"
    cwd = ready.folder(work / f"killed-{k}")
    killed = ready.run(cwd, kill_at=k)
    if killed.returncode == 0 and k > 1:  # threads may make a folder together, or one after another
        shutil.rmtree(cwd)
        return _killed(whole, k - 1, work)
    if killed.returncode != -9:
        return Outcome(name, False, f"it was not killed but ended with {killed.returncode}")
    again = ready.run(cwd)
    if again.returncode != 0:
        code = "hung" if again.returncode is None else f"ended with {again.returncode}"
        return Outcome(name, False, f"the next run {code}: {again.last_words}")
    wrong = differences(cwd, whole.expected)
    if not wrong:
        shutil.rmtree(cwd)
    return Outcome(name, not wrong, wrong)

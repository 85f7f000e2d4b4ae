"""Bad inputs of every kind: each ends in one line that says what to mend, and changes nothing."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from conftest import image

from campaign.cases import CASES, RUN, Case
from campaign.processes import Finished, Outcome, at_once, child
from campaign.spoiling import CANARY
from campaign.stages import SOFT

WHAT, RIGHT = "bad inputs", "were refused well"

_OURS = (".log", ".lock", ".yaml")  # what a refused run may add to: its own log and record


def outcomes(work: Path, quick: bool, workers: int) -> Iterator[Outcome]:
    """Every case in a folder of its own; `quick` takes one of each kind."""
    work.mkdir(parents=True, exist_ok=True)
    chosen = CASES[::_QUICK_STEP] if quick else CASES
    named = sorted({case.base for case in chosen} - {""})
    bases = {name: _made(work / f"base-{name}", name) for name in named}
    return at_once([partial(_tried, work, bases, case) for case in chosen], workers)


_QUICK_STEP = 15


def _made(folder: Path, name: str) -> Path:
    """A folder as a finished run, or a user, leaves it."""
    folder.mkdir()
    if name == "tree":
        for split, count in (("train", 4), ("val", 2)):
            for label, wnid in enumerate(("cat", "dog")):
                (folder / split / wnid).mkdir(parents=True)
                for i in range(count):
                    image(100 * label + i).save(folder / split / wnid / f"{i}.png")
        return folder
    done = child(folder, *(RUN if name == "run" else SOFT))
    if done.returncode != 0:
        raise RuntimeError(f"the run to be spoilt failed: {done.stderr[-2000:]}")
    return folder


def _tried(work: Path, bases: dict[str, Path], case: Case) -> Outcome:
    # whoever a command runs as must reach its folder
    place = None if case.options.get("as_nobody") else work
    here = Path(tempfile.mkdtemp(prefix=re.sub(r"\W+", "-", case.name)[:40] + "-", dir=place))
    if case.base:
        shutil.copytree(bases[case.base], here, dirs_exist_ok=True)
    case.spoil(here)
    before = _files(here)
    if case.options.get("as_nobody"):
        _give_away(here)
    done = child(here, *case.overrides, script=case.script, timeout=60, **case.options,
                 **case.environment)  # fmt: skip
    said = _wrong(case, here, before, done)
    if not said:
        shutil.rmtree(here, ignore_errors=True)
    return Outcome(case.name, not said, said)


def _wrong(case: Case, here: Path, before: dict[str, bytes], done: Finished) -> str:
    """What is not as it should be; "" if all is."""
    everything = done.stdout + done.stderr
    line = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    if done.returncode is None:
        return "hangs"
    if "Traceback" in everything or "Logging error" in everything:
        return f"traceback: {done.last_words}"
    if list(here.rglob(CANARY)):
        return "foreign code has run"
    if case.accepted:
        return "" if done.returncode == 0 else f"refused: {done.last_words}"
    if done.returncode != 1:
        return f"exit code {done.returncode}: {done.last_words}"
    if not line.startswith("error: ") or not re.search(case.said, line):
        return f"says otherwise than «{case.said}»: {line}"
    after = _files(here)
    lost = [n for n, data in before.items() if after.get(n) != data and not n.endswith(_OURS)]
    return f"changed {', '.join(lost[:3])}" if lost else ""


def _files(here: Path) -> dict[str, bytes]:
    """What a refused command has to leave alone."""
    return {
        str(path.relative_to(here)): path.read_bytes()
        for path in here.rglob("*")
        if path.is_file() and "cache/inventory" not in str(path)
    }


def _give_away(here: Path) -> None:
    """The folder and all in it to the user that the command runs as."""
    for path in (here, *here.rglob("*")):
        if not os.path.islink(path) and path.stat().st_mode & 0o200:
            os.chown(path, 65534, 65534)

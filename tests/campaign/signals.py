"""Ctrl-C and SIGTERM at moments of a real process: a sentence, a checkpoint, and the way on."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from conftest import command, image

from campaign.processes import Finished, Outcome, at_once, content, differences
from campaign.stages import (
    BACKBONE,
    FEW_STEPS,
    FINE_TUNING,
    QUICK,
    SMALL,
    TEACHER,
    TWO_CLASSES,
    Prepared,
    Stage,
    prepared,
)

WHAT, RIGHT = "signals", "ended right"

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS = 90  # that a process may take
_PATIENCE = 15  # seconds between a signal and the end
_UNQUIET = ("Traceback", "Exception ignored", "Error in sys")


@dataclass(frozen=True)
class Moment:
    """When a signal comes: `after` seconds after `there` holds for the first time.

    `there` gets the process's folder and number. `checkpoint` is a pattern of what must be in the
    folder after the signal.
    """

    name: str
    stage: Stage
    there: Callable[[Path, int], bool]
    after: float = 0.0
    checkpoint: str | None = None


def _loads(library: str) -> Callable[[Path, int], bool]:
    """Has the process opened a compiled module of this name? Then it is in the midst of imports."""

    def there(folder: Path, number: int) -> bool:
        try:
            return library in Path(f"/proc/{number}/maps").read_text()
        except OSError:  # it has ended
            return False

    return there


def _holds(pattern: str) -> Callable[[Path, int], bool]:
    return lambda folder, number: any(folder.glob(pattern))


def _many_images(inputs: Path) -> tuple[str, ...]:
    picture = inputs / "one.png"
    image(size=(200, 160)).save(picture)
    for split, images in (("train", 600), ("val", 2)):
        for wnid in ("cat", "dog"):
            folder = inputs / "tree" / split / wnid
            folder.mkdir(parents=True)
            for i in range(images):
                shutil.copy2(picture, folder / f"{i}.png")
    return (f"dataset.root={inputs / 'tree'}",)


_IMPORTS = Stage("imports", SMALL)
_INVENTORY = Stage(
    "inventory",
    (*QUICK[1:], "dataset=folder", "dataset.student_size=8", "ipc=2", "method=random",
     "protocol=hard_label_short", "compute.workers=1"),
    prepare=_many_images,
)  # fmt: skip
_SAMPLING = Stage("sampling", (*QUICK, "sampler.steps=150", "compute.batch_size=5"))
_STUDENT = Stage("student", (*SMALL, "protocol.epochs_by_ipc=[[null,700]]", "student_seeds=1"))
_TEACHER = Stage(
    "teacher",
    (*TEACHER[1:], "protocol.teacher.epochs=40"),
    "scripts/train_teacher.py",
)
_BACKBONE = Stage(
    "backbone",
    (*BACKBONE[:-2], "train.steps=800", "train.checkpoint_steps=100000"),
    "scripts/train_backbone.py",
)
_TUNING = Stage("fine-tuning", (*FINE_TUNING[:-3], "finetune.epochs=8", *FINE_TUNING[-2:]))
_SWEEP = Stage("sweep", ("-m", *QUICK, *TWO_CLASSES, *FEW_STEPS, "method=random,mgd3,closest_real"))

MOMENTS = (
    Moment("imports, Hydra", _IMPORTS, _loads("/yaml/")),
    Moment("imports, torch", _IMPORTS, _loads("libtorch_python")),
    Moment("imports, scikit-learn", _IMPORTS, _loads("/sklearn/")),
    Moment("inventory", _INVENTORY, _holds("cache/inventory/*/val/cat.json")),
    Moment("sampling", _SAMPLING, _holds("**/images/0/*.png")),
    Moment("student training", _STUDENT, _holds("**/manifest.json"), 1.5, "**/.*.checkpoint"),
    Moment("teacher training", _TEACHER, _holds("cache/students/.*lock"), 1.0, "cache/**/*.part"),
    Moment(
        "backbone training", _BACKBONE, _holds("own/weights.training/.run.lock"), 1.0,
        "own/weights.training/checkpoint.safetensors",
    ),
    Moment("fine-tuning", _TUNING, _holds("cache/finetuned/.*lock"), 1.0, "**/*.checkpoint"),
    Moment("a sweep", _SWEEP, _holds("**/results.jsonl")),
)  # fmt: skip
_QUICK_ONES = (("imports, torch", signal.SIGINT), ("imports, Hydra", signal.SIGTERM))


def outcomes(work: Path, quick: bool, workers: int) -> Iterator[Outcome]:
    """Both signals at each moment; the undisturbed run that they are held against comes first."""
    cases = [(m, s) for m, s in product(MOMENTS, SIGNALS)
             if not quick or (m.name, s) in _QUICK_ONES]  # fmt: skip
    stages = {m.stage.name: m.stage for m, _ in cases}
    found = at_once((partial(_whole, s, work / s.folder) for s in stages.values()), workers)
    wholes = dict(zip(stages, found, strict=True))
    tasks = [partial(_signalled, m, s, *wholes[m.stage.name], work) for m, s in cases]
    yield from at_once(tasks, workers)


def _whole(stage: Stage, work: Path) -> tuple[Prepared, dict[str, str], str]:
    """A stage, what its folder holds in the end, and what went wrong."""
    ready = prepared(stage, work / "inputs")
    cwd = ready.folder(work / "whole")
    done = ready.run(cwd, checkpoint_seconds=None)
    return ready, content(cwd), done.last_words if done.returncode != 0 else ""


def _signalled(
    moment: Moment,
    number: signal.Signals,
    ready: Prepared,
    expected: dict[str, str],
    failed: str,
    work: Path,
) -> Outcome:
    name = f"{number.name}, {moment.name}"
    if failed:
        return Outcome(name, False, f"undisturbed, it ended so: {failed}")
    cwd = ready.folder(work / f"{moment.stage.folder}-{number.name}-{MOMENTS.index(moment)}")
    done = _interrupted(moment, number, ready, cwd)
    wrong = _of_the_end(done, number)
    if moment.checkpoint and not any(cwd.glob(moment.checkpoint)):
        wrong.append(f"no checkpoint {moment.checkpoint}")
    again = ready.run(cwd, checkpoint_seconds=None)
    if again.returncode != 0:
        wrong.append(f"the next run ended with {again.returncode}: {again.last_words}")
    elif left := differences(cwd, expected):
        wrong.append(left)
    if not wrong:
        shutil.rmtree(cwd)
    return Outcome(name, not wrong, "; ".join(wrong))


def _interrupted(moment: Moment, number: signal.Signals, ready: Prepared, cwd: Path) -> Finished:
    """A process that a signal was sent to; code None if it has not ended for long."""
    said = {name: (cwd.parent / f"{cwd.name}.{name}").open("w+") for name in ("out", "err")}
    process = subprocess.Popen(
        command(*ready.overrides, script=ready.stage.script),
        cwd=cwd, stdout=said["out"], stderr=said["err"], env=os.environ | ready.stage.environment,
    )  # fmt: skip
    end = time.monotonic() + _SECONDS
    while process.poll() is None and time.monotonic() < end:
        if moment.there(cwd, process.pid):
            time.sleep(moment.after)
            break
        time.sleep(0.002)
    process.send_signal(number)
    try:
        code = process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = None
    texts = {}
    for name, file in said.items():
        file.seek(0)
        texts[name] = file.read()
        file.close()
    return Finished(code, texts["out"], texts["err"])


def _of_the_end(done: Finished, number: signal.Signals) -> list[str]:
    """What is wrong with how an interrupted process ended."""
    if done.returncode is None:
        return [f"it went on for {_PATIENCE} s"]
    if done.returncode == 0:
        return ["it had ended before: too early or too late a signal"]
    wrong = []
    if done.returncode != 128 + number:
        wrong.append(f"it ended with {done.returncode}, not {128 + number}")
    wrong += [f"«{words}» on stderr" for words in _UNQUIET if words in done.stderr]
    sentences = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    if len(sentences) != 1:
        wrong.append(f"{len(sentences)} sentences, not one: {done.last_words[-150:]!r}")
    return wrong

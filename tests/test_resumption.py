"""A run that ends at its k-th atomic write, for every k, goes on to what a whole one leaves."""

import hashlib
import json
import os
import shutil
import threading
from itertools import count

import pytest
from conftest import QUICK, run

SMALL = (
    *QUICK, "dataset.classes=[0,1]", "ipc=2", "sampler.steps=4", "guidance.stop_t=1",
    "compute.batch_size=3", "student_seeds=2",
)  # fmt: skip


def content(folder):
    """Images and modes by path, scores by student."""
    files = [*folder.rglob("images/*/*.png"), *folder.rglob("modes/*.safetensors")]
    found = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    rows = [json.loads(line) for f in folder.rglob("results.jsonl") for line in f.open()]
    keys = ("student", "student_seed", "top1_last", "top1_best", "run_id", "cell_id")
    return found, sorted(tuple(r[k] for k in keys) for r in rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run, and copies of it from before each of its writes."""
    replace, one_at_a_time, before = os.replace, threading.Lock(), []
    whole = tmp_path_factory.mktemp("whole")

    def noted(*args, **kwargs):
        with one_at_a_time:
            before.append(tmp_path_factory.mktemp("before") / f"write-{len(before) + 1}")
            shutil.copytree(whole, before[-1])
            return replace(*args, **kwargs)

    with pytest.MonkeyPatch.context() as watched:
        watched.setattr(os, "replace", noted)
        assert run(whole, *SMALL).returncode == 0
    return whole, before


def test_every_write_may_be_the_last(finished):
    """What is on disk before a write is what a run leaves that dies there."""
    whole, before = finished
    expected = content(whole)
    assert len(expected[0]) == 4 + 3 and len(expected[1]) == 2
    assert len(before) > 20
    for cwd in before:
        assert list(cwd.rglob("*.tmp")), f"{cwd.name} lacks what was to be renamed"
        goes_on(cwd, expected)


def goes_on(cwd, expected):
    resumed = run(cwd, *SMALL)
    assert resumed.returncode == 0, f"{cwd.name}: {resumed.stderr[-1500:]}"
    assert content(cwd) == expected, cwd.name
    assert not list(cwd.rglob("*.tmp")), cwd.name


class KilledError(BaseException):
    """Nothing that the program catches."""


@pytest.mark.parametrize("last", [5, 15, 24])
def test_an_error_at_a_write_leaves_what_the_next_run_needs(finished, tmp_path, monkeypatch, last):
    """What is cleared away and written on the way out, which after a death nothing is."""
    replace, written = os.replace, count(1)

    def fails(*args, **kwargs):
        if next(written) == last:
            raise KilledError
        return replace(*args, **kwargs)

    with monkeypatch.context() as failing:
        failing.setattr(os, "replace", fails)
        killed = run(tmp_path, *SMALL)
    assert killed.returncode == 1 and "KilledError" in killed.stderr
    goes_on(tmp_path, content(finished[0]))

"""A run that dies at its k-th atomic write, for every k, ends as one that ran through."""

import hashlib
import json
import os
from itertools import count

from conftest import QUICK, run

SMALL = (
    *QUICK, "dataset.classes=[0,1]", "ipc=2", "sampler.steps=4", "guidance.stop_t=1",
    "compute.batch_size=3", "student_seeds=2",
)  # fmt: skip


class KilledError(BaseException):
    """Nothing that the program catches."""


def content(folder):
    """Images and modes by path, scores by student."""
    files = [*folder.rglob("images/*/*.png"), *folder.rglob("modes/*.safetensors")]
    found = {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    rows = [json.loads(line) for f in folder.rglob("results.jsonl") for line in f.open()]
    keys = ("student", "student_seed", "top1_last", "top1_best", "run_id", "cell_id")
    return found, sorted(tuple(r[k] for k in keys) for r in rows)


def test_every_write_may_be_the_last(tmp_path, monkeypatch):
    replace, left = os.replace, [0]

    def counted(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise KilledError
        return replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", counted)
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run(whole, *SMALL).returncode == 0
    expected = content(whole)
    assert len(expected[0]) == 4 + 3 and len(expected[1]) == 2

    for k in count(1):
        cwd = tmp_path / f"killed-{k}"
        cwd.mkdir()
        left[0] = k
        killed = run(cwd, *SMALL)
        if killed.returncode == 0:  # it needs fewer than k
            break
        assert killed.returncode == 1 and "KilledError" in killed.stderr, f"write {k}"
        left[0] = 0
        resumed = run(cwd, *SMALL)
        assert resumed.returncode == 0, f"write {k}: {resumed.stderr[-1500:]}"
        assert content(cwd) == expected, f"write {k}"
        assert not [f for f in cwd.rglob("*.tmp")], f"write {k}"
    assert k > 20

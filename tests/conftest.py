"""Shared pieces: a tiny dataset on disk, and running the command line as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# A run that takes seconds: closed-form backbone, one small student, three epochs.
QUICK = (
    "backbone=toy", "tracker=none", "report=false",
    "students=[convnet2_w8]", "protocol.epochs_by_ipc=[[null,3]]", "device=cpu",
)  # fmt: skip


def command(*overrides, script="run.py"):
    return [sys.executable, str(ROOT / script), *overrides]


def run(cwd, *overrides, script="run.py", **environment):
    """The finished process of `python run.py OVERRIDES` in `cwd`."""
    return subprocess.run(
        command(*overrides, script=script),
        cwd=cwd,
        env={k: v for k, v in (os.environ | environment).items() if v is not None},
        capture_output=True,
        text=True,
        timeout=240,
    )


def image(seed=0, size=(20, 16)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def tree(tmp_path):
    """train/ and val/ with classes cat and dog, four and two noise images each."""
    root = tmp_path / "tree"
    for split, count in (("train", 4), ("val", 2)):
        for label, wnid in enumerate(("cat", "dog")):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                image(seed=100 * label + i).save(folder / f"{i}.png")
    return root

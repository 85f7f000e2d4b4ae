"""Shared pieces: a tiny dataset on disk, and running the command line as a user does."""

import contextlib
import gc
import io
import logging
import os
import pickle

# Tests mean the CPU, beside a GPU too, so none is seen from here on: torch looks once, when it is
# first asked. Tests marked `gpu` run processes of their own, in the environment `seeing_gpus`.
_SEEN = "MGD3_TESTS_SEE"  # what could be seen; processes that share the tests inherit it
_SHOWN = "shown"  # one of those processes of their own
os.environ.setdefault(_SEEN, os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
if os.environ[_SEEN] != _SHOWN:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import runpy
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from PIL import Image
from servers import HUB_TOKEN, Hub

ROOT = Path(__file__).resolve().parents[1]


def _parsing_once(load):
    """OmegaConf's `load`, which parses the text of a file once.

    Hydra has some thirty files parsed for each composition, and the tests compose thousands of
    times.
    """
    parsed = {}

    def load_text(file):
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in parsed:
            file.seek(0)
            parsed[text] = pickle.dumps(load(file))
        return pickle.loads(parsed[text])  # the caller's own, for Hydra writes into it

    return load_text


OmegaConf.load = staticmethod(_parsing_once(OmegaConf.load))
os.environ["MGD3_ARCHIVES"] = "none"  # no test fetches gigabytes

# Modules that take longest start first, so that no process waits for the last one at the end.
LONGEST = (
    "test_reproduce", "test_grid", "test_run", "test_dry", "test_distributed", "test_compute",
    "test_resumption", "test_campaign", "test_scripts", "test_privacy", "test_swept_runs",
    "test_fetch_weights", "test_claims", "test_composition", "test_tuning", "test_soft_label",
    "test_own_images", "test_from_nothing", "test_shown_on_the_way", "test_docs", "test_extending",
)  # fmt: skip

# A run that takes seconds: closed-form backbone, one small student, three epochs.
QUICK = (
    "backbone=toy", "tracker=none", "report=false",
    "students=[convnet2_w8]", "protocol.epochs_by_ipc=[[null,3]]", "compute.device=cpu",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(m) if (m := item.path.stem) in LONGEST else 99)


def pytest_collection_finish():
    """What is loaded by now stays: looking through it for garbage takes a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not _gpus():
        pytest.skip("torch finds no GPU")


def seeing_gpus():
    """An environment for processes that may see what GPUs there are."""
    seen = os.environ[_SEEN]
    shown = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | {_SEEN: _SHOWN}
    return shown if seen == "all" else shown | {"CUDA_VISIBLE_DEVICES": seen}


def _gpus():
    """How many torch finds, in a process that may see them."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=seeing_gpus(), capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def command(*overrides, script="run.py"):
    return [sys.executable, str(ROOT / script), *overrides]


def run(cwd, *overrides, script="run.py", **environment):
    """What `python run.py OVERRIDES` in `cwd` prints and returns, in this process.

    Starting Python and importing torch anew would take seconds each time; what only a process can
    show (signals, torchrun, what is read at import) uses `apart`.
    """
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = dict(os.environ), Path.cwd(), sys.argv, list(sys.path), logging.root.manager.disable
    handlers, level = logging.root.handlers[:], logging.root.level
    try:
        os.chdir(cwd)
        for key, value in environment.items():
            os.environ.pop(key, None) if value is None else os.environ.update({key: value})
        sys.argv = [str(ROOT / script), *map(str, overrides)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
                code = 1
            if "wandb" in sys.modules:  # its service writes a record's end when the process ends
                sys.modules["wandb"].teardown()
    finally:
        GlobalHydra.instance().clear()
        os.environ.clear()
        os.environ.update(before[0])
        os.chdir(before[1])
        sys.argv, sys.path[:] = before[2], before[3]
        for handler in logging.root.handlers:
            if handler not in handlers:
                handler.close()
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        logging.disable(before[4])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def apart(cwd, *overrides, script="run.py", **environment):
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


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that torch.compile is given from now on; it runs as it is, without the minute."""
    import torch  # here and not above: what only reads this file need not load it

    seen = []

    def noting(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=noting))
    yield seen
    torch.compiler.reset()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process asks; it is told where at import, and would be in `HF_ENDPOINT`."""
    with Hub() as hub:
        files = "{repo_id}/resolve/{revision}/{filename}"
        constants = {
            "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.url}/{files}",
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"), "HF_HUB_CACHE": str(tmp_path / "hub"),
        }  # fmt: skip
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", HUB_TOKEN)
        yield hub

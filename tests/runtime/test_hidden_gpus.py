"""The suite means the CPU, whatever the machine has: in this process and in those it starts."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, seeing_gpus

WHERE = "from mgd3.runtime.compute import pick_device; print(pick_device('auto'))"
HIDDEN = (
    "import os, sys; import conftest; assert 'torch' not in sys.modules, 'too late'; "
    "print(repr(os.environ.get('CUDA_VISIBLE_DEVICES')))"
)
SHOWN = "import conftest; print(repr(conftest.seeing_gpus().get('CUDA_VISIBLE_DEVICES')))"


def printed(code, environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_no_gpu_is_seen_here_or_in_processes_of_this_one():
    import torch

    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
    assert printed(WHERE, dict(os.environ)) == "cpu"


@pytest.mark.parametrize("before", [None, "0", "3,1"])
def test_gpus_are_hidden_before_torch_is_loaded_and_shown_where_asked_for(before):
    """As a suite that begins on a machine with GPUs, of which some may be chosen."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "MGD3_TESTS"))}
    own |= {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
    assert printed(HIDDEN, own) == "''"
    assert printed(SHOWN, own) == repr(before)
    inside = {**own, "MGD3_TESTS_SEE": "shown"}
    assert printed(HIDDEN, inside) == repr(before)


@pytest.mark.gpu
def test_a_process_that_may_see_a_gpu_takes_it():
    assert printed(WHERE, seeing_gpus()).startswith("cuda")

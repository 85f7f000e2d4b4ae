"""Every path that a GPU would take, on a device that keeps a GPU's rules and counts.

The constants are what is true now; `PYTHONPATH=tests python -m dry` prints every figure with its
lines. Where one can be lowered, lower it: nothing else says that a wait or a copy has come back.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, seeing_gpus

pytestmark = pytest.mark.timeout(600)  # the table: a minute of one core, and as often others' too

# A subject's limit is that of the longest beginning of its name.
# The most waits of a step: values that the host reads, and copies that block. Copies of memory that
# is not pinned block; as the device has none to pin, it believes `non_blocking`.
MOST_WAITS = {
    "": 0,
    "decoding": 2,  # of a batch, read together: which samples are finite, and the pixels
    "encoding": 3,  # of 16 images, once the next are decoded: what is finite, mean, deviation
    "soft_label_fkd": 1,  # answers that are stored go to a file
    "set metrics": 6,  # each image alone: pixels, features, logits
}
# The most copies of a step, blocking or not.
MOST_COPIES = {
    "": 1,
    "decoding": 5,  # of a batch: class rows and modes, x_T, z; and those two
    "encoding": 4,  # pixels, the posterior's noise, latents, what is finite
    "hard_label convnet3_w8 mapped": 2,  # the images too, which stay in a file
    "soft_label_fkd": 3,
    "set metrics": 6,
}
# The most bytes that a step copies to the device, in those of its images as uint8.
MOST_BYTES = {
    "": 1.0,
    "decoding dit_digits": 2.8,  # x_T and z in float32 for every pixel, of one channel
    "encoding": 1.1,  # beside the pixels the posterior's noise
    "hard_label convnet3_w8 mapped": 1.2,
    "fine-tuning": 2.8,  # latents and noise in float32, of images whose latents are their pixels
    "from scratch": 1.8,
}
# How far values may be from the CPU's. Bit for bit where nothing is said: attention has no kernel
# of its own on this device and is computed from its definition, so the CPU is asked to do the same
# (its fused kernel rounds apart). CUDA's bfloat16 autocast keeps other operations in float32 than
# the CPU's: softmax, norms and losses.
MOST_DIFFERENT = {
    "": 0.0,
    "sampling dit_digits ddpm mode bfloat16": 64.0,  # grey levels of 255
    "hard_label convnet3_w8 bfloat16": 1e-3,
}


def limit(limits, name):
    return limits[max((k for k in limits if name.startswith(k)), key=len)]


def checked(name, **options):
    """The module's own tests, of which this process must not run any."""
    file = str(Path(__file__).with_name(name))
    done = apart("-m", "pytest", "-q", "-p", "no:cacheprovider", file, **options)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    file = tmp_path_factory.mktemp("dry") / "table.json"
    done = apart("-m", "dry", f"json={file}")
    assert done.returncode == 0, done.stderr
    return [SimpleNamespace(**figures) for figures in json.loads(file.read_text())]


def apart(*arguments, environment=os.environ):
    """A device cannot be taken back from a process, so it is never this one's."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**environment, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_the_device_keeps_cudas_rules():
    checked("device_checks.py")


@pytest.mark.gpu
def test_a_gpu_agrees_with_the_cpu():
    checked("gpu_checks.py", environment=seeing_gpus())


def test_nothing_mixes_devices_or_reads_them_as_arrays(table):
    assert len(table) > 60
    assert not [f"{f.name}: {f.refused}" for f in table if f.refused]


def test_values_are_the_cpus(table):
    wrong = {f.name: f.difference for f in table if f.difference > limit(MOST_DIFFERENT, f.name)}
    assert not wrong


def test_a_step_waits_no_more_than_it_must(table):
    waits = {f.name: sum(n for _, _, n in f.waits) for f in table}
    over = {f.name: f.waits for f in table if waits[f.name] > limit(MOST_WAITS, f.name)}
    assert not over


def test_a_step_copies_no_more_often_than_it_must(table):
    copies = {f.name: sum(n for _, _, n in f.copies) for f in table}
    over = {f.name: f.copies for f in table if copies[f.name] > limit(MOST_COPIES, f.name)}
    assert not over


def test_a_step_copies_less_to_the_device_than_its_images(table):
    sizes = {f.name: sum(f.to_device.values()) / f.pixels for f in table}
    over = {f.name: f.to_device for f in table if sizes[f.name] > limit(MOST_BYTES, f.name)}
    assert not over


def test_no_expanded_tensor_is_copied(table):
    """It would be written out on the host first, many times its own size."""
    assert not {f.name: f.expanded for f in table if f.expanded}

"""plan=MACHINE: what a run would take on a machine that is not here, without its data."""

import re

import pytest
from conftest import run

IMAGENET = (
    "dataset=imagenet1k", "ipc=50", "protocol=soft_label", "tracker=none", "compute.workers=16",
)  # fmt: skip


def figures(out, stage):
    """The line of a stage, as numbers and words."""
    (line,) = (line for line in out.splitlines() if stage in line)
    return [cell.strip() for cell in line.split("│")[2:-1]]


def test_imagenet_is_counted_without_imagenet(tmp_path):
    one = run(tmp_path, *IMAGENET, "students=[convnet3_w8]", "plan=h100x1", IMAGENET_DIR=None)
    eight = run(tmp_path, *IMAGENET, "students=[]", "plan=h100x8", IMAGENET_DIR=None)
    assert one.returncode == eight.returncode == 0, one.stderr
    # 1,281,167 images of 0.273 TFLOP, 40 % of 67 TFLOP/s
    assert figures(one.stdout, "encodes 1,281,167 images, float32")[:3] == [
        "3.63",
        "3.6 h",
        "20.99",
    ]
    assert figures(eight.stdout, "encodes 1,281,167 images")[:2] == ["3.63", "27 min"]
    # 50,000 images, 50 steps of two passes of 0.237 TFLOP, 60 %
    assert figures(one.stdout, "samples 50,000 images in 50 steps")[0] == "8.19"
    assert figures(one.stdout, "looks at 1,331,167 real images")[1] == "3 min"
    assert "15,000,000 times" in one.stdout and "Nothing of this was measured" in one.stdout
    assert not list(tmp_path.iterdir())


def test_a_preset_of_a_gpu_is_counted_without_one(tmp_path):
    words = "compute=gpu_fast", "compute.encoding_precision=bfloat16", "plan=h200x1"
    done = run(tmp_path, *IMAGENET, *words, "students=[]", IMAGENET_DIR=None)
    assert figures(done.stdout, "encodes 1,281,167 images, bfloat16")[1] == "24 min"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan=h100"], "plan='h100' is unknown.*h100x1"),
        (["backbone=toy", "plan=h100x1"], "backbone=toy: .*states no rate"),
        (["method=minimax", "plan=h100x1"], "finetune=minimax: .*states no rate"),
        (["method=herding", "plan=h100x1"], "method=herding: .*states no rate"),
    ],
)
def test_what_has_no_rate_is_named(words, message, tmp_path):
    done = run(tmp_path, *IMAGENET, *words, IMAGENET_DIR=None)
    assert done.returncode
    assert re.search(message, done.stderr.replace("\n", " ")), done.stderr

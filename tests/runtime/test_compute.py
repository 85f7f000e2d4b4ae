"""Precision, memory layout, batch sizes: options that must not change what is computed."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, run
from networks import small_vae
from support import GOLDEN, composed

from eval.results.rows import read_results
from mgd3.backbones.codecs import make_codec
from mgd3.backbones.dit import DiT
from mgd3.config.build import build_compute, build_execution
from mgd3.config.command import errors_for_people
from mgd3.data.digits import Digits
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.modes.finders import KMeansModes
from mgd3.runtime.batching import Batches, free_bytes, largest_batch, peak_bytes
from mgd3.runtime.compute import Compute, Work, pick_device
from mgd3.runtime.errors import UserError
from mgd3.runtime.hardware import full_gpu
from mgd3.sampling.guidance import ModeGuidance
from mgd3.sampling.samplers import DDPM

DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"


def distil(folder, batch_size=50, ipc=2, steps=10, **compute):
    """Pixels (20, 8, 8, 3) of the shipped network's digits, int."""
    backbone = DiT(DIGITS, vae=None, image_size=8, compute=Compute(**compute))
    distiller = GenerativeDistiller(
        backbone,
        DDPM(steps=steps, cfg_scale=4.0, cfg_channels=3),
        ModeGuidance(0.1, steps // 2),
        KMeansModes(),
        Work(cache=folder.parent / "cache", batch_size=batch_size, workers=1, flip="none"),
    )
    out = distiller.distill(Digits(8), ipc, 0, folder, {"method": "m", "config": {}})
    return torch.stack(
        [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i, _ in out.images()]
    ).int()


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({"precision": "tf32"}, 0.01),
        ({"channels_last": True}, 0.01),
        ({"vae_slicing": True}, 0.01),
        ({"compile": True}, 0.01),
        ({"precision": "bfloat16"}, 1.5),
        ({"precision": "float16"}, 0.5),
    ],
    ids=str,
)
def test_options_leave_the_pictures(options, mean, tmp_path):
    """Grey levels of 255; the half precisions round, the others must not be seen."""
    expected = distil(tmp_path / "plain")
    assert (distil(tmp_path / "other", **options) - expected).abs().float().mean() <= mean


def test_weights_and_results_are_float32_in_every_precision(tmp_path):
    small_vae(tmp_path / "vae")
    for precision in ("float32", "tf32", "bfloat16", "float16"):
        compute = Compute(precision=precision)
        dit = DiT(
            str(GOLDEN / "dit_mode_guidance.pt"), str(tmp_path / "vae"), 64, 4, compute=compute
        )
        out = dit.predict(torch.ones(2, 4, 8, 8), torch.tensor([3, 4]), torch.tensor([0, 1]))
        assert {out.eps.dtype, out.variance.dtype, dit.bare.network.dtype} == {torch.float32}
        assert dit.codec.decode(out.eps).dtype == torch.float32
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.is_autocast_enabled("cpu")


def test_encoding_has_a_precision_of_its_own(tmp_path):
    small_vae(tmp_path / "vae")
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    plain, half, sliced, rounded = (
        make_codec(str(tmp_path / "vae"), 64, compute=Compute(**options)).encode(images, "abc")
        for options in (
            {},
            {"precision": "bfloat16"},
            {"vae_slicing": True},
            {"encoding_precision": "bfloat16"},
        )
    )
    assert torch.equal(plain, half)
    assert torch.allclose(plain, sliced, atol=1e-5)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - plain).abs().max() < 0.02 * plain.abs().max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "int8"},
            "compute.precision='int8' is unknown.*float32, tf32, bfloat16, float16",
        ),
        ({"compile": "yes"}, "compute.compile='yes' must be true or false"),
        ({"device": "warp"}, "device=warp is not available"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Compute(**options)


@pytest.mark.parametrize(
    ("value", "denoiser", "training"),
    [("false", False, False), ("true", True, True), ("training", False, True)],
)
def test_what_trains_can_be_compiled_without_the_denoiser(value, denoiser, training):
    cfg = composed(f"compute.compile={value}", "compute.device=cpu")
    assert build_compute(cfg).compile is denoiser
    assert build_execution(cfg)["compile"] is training
    with pytest.raises(UserError, match=r"compute\.compile='yes' must be true, false or training"):
        build_execution(composed("compute.compile='yes'"))


def test_float16_that_overflows_is_an_error_and_writes_nothing(tmp_path):
    tensors = DiT(DIGITS, vae=None, image_size=8).bare.network.state_dict()
    assert tensors  # the file is readable: what follows is about precision alone
    backbone = DiT(DIGITS, vae=None, image_size=8, compute=Compute(precision="float16"))
    with torch.inference_mode():
        backbone.bare.network.proj_out_2.weight.mul_(1e6)
    distiller = GenerativeDistiller(
        backbone,
        DDPM(steps=2, cfg_scale=1.0, cfg_channels=3),
        ModeGuidance(0.1, 0),
        KMeansModes(),
        Work(cache=tmp_path / "cache", batch_size=10, workers=1, flip="none"),
    )
    with pytest.raises(UserError, match=r"precision=float16 overflows \(use bfloat16\)"):
        distiller.distill(Digits(8), 1, 0, tmp_path / "out", {})
    assert not list(tmp_path.rglob("*.png"))


def test_peak_memory_counts_what_lives_together():
    def work():
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.view(10, 100) + 1  # and as many
        del a
        return b.sum() + torch.zeros(500).sum()  # beside b alone

    assert 8000 <= peak_bytes(work) <= 8100


def test_the_automatic_batch_follows_the_memory_that_a_row_takes():
    device = torch.device("cpu")
    row = free_bytes(device) // 40  # 0.7 of free memory takes 28 rows, less one for slack

    def work(rows):
        return torch.empty(rows, row, dtype=torch.uint8)

    assert largest_batch(work, device) == 16
    assert largest_batch(lambda rows: torch.empty(rows), device) == 128
    assert largest_batch(lambda rows: torch.empty(rows, 20 * row, dtype=torch.uint8), device) == 1


def test_batch_size_auto_makes_the_same_digits(tmp_path):
    automatic = distil(tmp_path / "auto", batch_size="auto", ipc=1)
    assert (automatic - distil(tmp_path / "four", batch_size=4, ipc=1)).abs().max() <= 1


class _Limited:
    """A stand-in for memory: takes a given number of rows and no more."""

    def __init__(self, rows):
        self.rows, self.calls = rows, []

    def __call__(self, part):
        self.calls.append(len(part))
        if len(part) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return part + 1


def test_parts_shrink_until_they_fit_and_stay_small():
    work, batches = _Limited(3), Batches(16, "decoding")
    for _ in range(2):
        assert torch.equal(in_parts(batches, work), torch.arange(10) + 1)
    assert work.calls == [10, 5, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    with pytest.raises(UserError, match=r"decoding a single image; try compute.vae_slicing=true"):
        in_parts(Batches(16, "decoding"), _Limited(0))


def in_parts(batches, work):
    done = []
    for attempt in batches.attempts(torch.arange(10)):
        with attempt as part:
            done.append(work(part))
    return torch.cat(done)


@pytest.mark.parametrize(
    ("free", "own", "said"),
    [
        (
            1,
            2,
            "cuda:0 has 1.0 of 80.0 GiB free: other processes hold 77.0 .*compute.device=cuda:N",
        ),
        (1, 78, "cuda:0 has 1.0 of 80.0 GiB free, and this process holds 78.0$"),
    ],
)
def test_a_full_gpu_says_who_fills_it(free, own, said):
    assert re.search(said, full_gpu("cuda:0", free << 30, 80 << 30, own << 30))


def test_memory_that_runs_out_anywhere_is_a_sentence(capsys):
    with pytest.raises(SystemExit), errors_for_people():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory") and "Tried to allocate 2.00 GiB" in said


def test_gpu_fast_takes_the_cores_that_its_process_has(monkeypatch):
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert composed("compute=gpu_fast").compute.workers == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # so many processes share them
    assert composed("compute=gpu_fast").compute.workers == 1
    assert composed("compute=gpu_fast", "compute.workers=3").compute.workers == 3


def test_other_errors_are_not_taken_for_memory():
    def fail(part):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        in_parts(Batches(4, "sampling"), fail)


@pytest.mark.parametrize(("rows", "size"), [(1, 1), (0, None)])
def test_memory_for_one_image_or_none(rows, size):
    def work(count):
        return _Limited(rows)(torch.arange(count))

    if size is None:
        with pytest.raises(UserError, match="out of memory while sampling a single image"):
            largest_batch(work, torch.device("cpu"))
    else:
        assert largest_batch(work, torch.device("cpu")) == size


OUT_OF_MEMORY = """
import resource, sys, logging, torch
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/runtime"]
import test_compute
logging.basicConfig(level=logging.WARNING)
torch.set_num_threads(1)
folder = Path(sys.argv[1])
test_compute.distil(folder / "first", batch_size=10, ipc=1)  # everything is loaded
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]) * 2**20,) * 2)
pixels = test_compute.distil(folder / "second", batch_size=1000, ipc=100, steps=2)
print("images", len(pixels))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit on a process's memory")
def test_a_process_short_of_memory_goes_on_with_smaller_batches(tmp_path):
    """A real limit on the address space, far below what 1,000 images at once would take."""
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            OUT_OF_MEMORY.format(tests=str(ROOT / "tests")),
            str(tmp_path),
            "140",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "images 1000" in done.stdout
    assert "out of memory while sampling 1000 images at once; going on with 500" in done.stderr


DETERMINISTIC = (
    "method=random", "dataset.classes=[0,1,7]", "ipc=10", "tracker=none", "report=false",
    "students=[convnet3_w64]", "protocol.epochs_by_ipc=[[null,12]]", "compute.device=cpu",
    "compute.deterministic=true",
)  # fmt: skip


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.use_deterministic_algorithms(False)


def test_a_deterministic_run_gives_the_same_rows_with_any_number_of_threads(tmp_path, _threads):
    rows = []
    for threads in (1, 2):
        (tmp_path / str(threads)).mkdir()
        torch.set_num_threads(threads)
        done = run(tmp_path / str(threads), *DETERMINISTIC)
        assert done.returncode == 0, done.stderr[-2000:]
        rows += read_results(tmp_path / str(threads))
    one, two = (replace(row, train_seconds=0.0, test_seconds=0.0) for row in rows)
    assert one == two
    assert (one.threads, one.deterministic, one.device) == (1, True, "cpu")
    assert one.versions.startswith("python 3.") and "torch 2." in one.versions


def test_an_operation_without_a_deterministic_form_is_named(capsys):
    raised = RuntimeError(
        "put_ does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'."
    )
    with pytest.raises(SystemExit) as end, errors_for_people():
        raise raised
    assert end.value.code == 1
    assert "compute.deterministic=true: put_ has no deterministic form" in capsys.readouterr().err


def test_one_gpu_is_not_for_all_of_torchruns_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"device=cuda:0: torchrun gives every process a GPU"):
        pick_device("cuda:0")
    assert pick_device("cpu").type == "cpu"

"""Data parallel training: two CPU processes give what one does; images in a mapped file."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, run
from PIL import Image
from timm.layers import convert_sync_batchnorm

from eval.images import training_images
from eval.results.rows import read_results
from eval.students.registry import make_student, synchronised
from mgd3.backbones.toy import Toy
from mgd3.data.datasets import ImageTree
from mgd3.data.digits import Digits
from mgd3.data.distilled import DistilledDataset, DistilledWriter
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.modes.finders import KMeansModes
from mgd3.runtime.compute import Work
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidances.deviation import DeviationGuidance
from mgd3.sampling.samplers import DDIM

RUN = (
    "method=random", "ipc=3", "tracker=none", "report=false", "student_seeds=2",
    "compute.device=cpu", "students=[convnet2_w8]", "compute.workers=1",
)  # fmt: skip
PROTOCOLS = {
    "hard": ("protocol.epochs_by_ipc=[[null,6]]", "protocol.optimization.batch_size=7"),
    "soft": (
        "protocol=soft_label_short", "protocol.epochs=6", "protocol.teacher.epochs=12",
        "protocol.batch_by_ipc=[[1,7]]",
    ),
}  # fmt: skip


def found(cwd):
    return [(r.student_seed, r.top1_last, r.top1_best, r.tests) for r in read_results(cwd / "runs")]


def alone(cwd, *overrides):
    cwd.mkdir(exist_ok=True)
    done = run(cwd, *overrides)
    assert done.returncode == 0, done.stderr[-2000:]
    return found(cwd)


# Members are forked from a clean process that has imported everything once: this one may have
# used autograd, whose threads do not survive a fork.
MEMBERS = multiprocessing.get_context("forkserver")
MEMBERS.set_forkserver_preload(["conftest", "scripts.run_cell", "sklearn.datasets", __name__])


def member(cwd, rank, port, overrides):
    done = run(
        cwd, *overrides, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
    )  # fmt: skip
    Path(cwd, f"stderr-{rank}.txt").write_text(done.stderr)
    os._exit(done.returncode)


def together(cwd, *overrides):
    """Two processes, as torchrun starts them."""
    cwd.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    members = [
        MEMBERS.Process(target=member, args=(cwd, rank, port, overrides)) for rank in range(2)
    ]
    for process in members:
        process.start()
    for process in members:
        process.join(120)
    said = "".join(f.read_text()[-2000:] for f in sorted(cwd.glob("stderr-*.txt")))
    assert [process.exitcode for process in members] == [0, 0], said
    return found(cwd)


@pytest.mark.parametrize("kind", PROTOCOLS)
def test_two_processes_give_what_one_does(tmp_path, kind):
    one = alone(tmp_path / "one", *RUN, *PROTOCOLS[kind])
    two = together(tmp_path / "two", *RUN, *PROTOCOLS[kind], "compute.parallel=batches")
    assert len(one) == len(two) == 2
    for ours, theirs in zip(two, one, strict=True):
        assert (ours[0], ours[3]) == (theirs[0], theirs[3])
        assert ours[1:3] == pytest.approx(theirs[1:3], abs=100 / 719 * 2)  # two images of 719


def test_shares_hold_every_row_once():
    for count, world in [(7, 2), (64, 3), (5, 4), (1, 2)]:
        shares = [Ranks(rank, world).share(count) for rank in range(world)]
        assert sum(part for _, part in shares) == pytest.approx(1)
        rows = [i for mine, part in shares if part for i in range(count)[mine]]
        assert rows == list(range(count))
        assert all(len(range(count)[mine]) >= 1 for mine, _ in shares)


def bounds(folder, rank, numbers):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(numbers)
    )
    found = Ranks(rank, len(numbers)).least_and_most(numbers[rank], torch.device("cpu"))
    Path(folder, str(rank)).write_text(str(found))


def test_processes_sample_as_many_at_once_as_the_smallest_gpu_can(tmp_path):
    members = [MEMBERS.Process(target=bounds, args=(tmp_path, r, (64, 16))) for r in range(2)]
    for process in members:
        process.start()
    for process in members:
        process.join(120)
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["(16, 64)"] * 2
    assert Ranks().least_and_most(5, torch.device("cpu")) == (5, 5)


def test_batch_norm_needs_gpus():
    with pytest.raises(UserError, match="batch norm cannot share batches among CPU"):
        synchronised(make_student("resnet18_bn", 3, 32, seed=0), Ranks(0, 2))
    net = make_student("convnet2_w8", 3, 32, seed=0)
    assert synchronised(net, Ranks(0, 2)) is net


@pytest.mark.parametrize("name", ["resnet18_bn", "timm/efficientnet_b0"])
def test_synchronised_batch_norms_compute_what_they_did(name):
    net = make_student(name, 3, 32, seed=0).eval()
    images = torch.randn(2, 3, 32, 32)
    before = net(images)
    assert torch.allclose(convert_sync_batchnorm(net)(images), before, atol=1e-5)


def test_images_that_do_not_fit_are_mapped(tree, tmp_path):
    writer = DistilledWriter(tmp_path / "set", ImageTree("t", None, str(tree), 16), ipc=2, seed=0)
    for label, wnid in enumerate(("cat", "dog")):
        for k in range(2):
            writer.write_image(wnid, k, Image.new("RGB", (9, 9), (50 * label + k, 7, 9)))
    writer.finish({"method": "m", "config": {}}, {})
    distilled, cpu = DistilledDataset(tmp_path / "set"), torch.device("cpu")
    held = training_images(distilled, 8, cpu, tmp_path, 1)
    for _ in range(2):  # written, then found
        mapped = training_images(distilled, 8, cpu, tmp_path, 1, limit=100)
        assert all(torch.equal(a, b) for a, b in zip(held, mapped, strict=True))
    (file,) = (tmp_path / "pixels").glob("*.uint8")
    assert file.stat().st_size == 4 * 3 * 8 * 8 + 4  # and a checksum


def files(folder):
    """Content of every image and mode file below a folder, by path."""
    found = [*folder.rglob("images/*/*.png"), *folder.rglob("modes/*.safetensors")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in found}


SHARDED = (
    "backbone=toy", "ipc=5", "compute.batch_size=7", "tracker=none", "report=false",
    "students=[convnet2_w8]", "student_seeds=3", "protocol.epochs_by_ipc=[[null,3]]",
    "compute.device=cpu", "compute.workers=1",
)  # fmt: skip


def test_processes_share_images_and_students(tmp_path):
    """Byte for byte what one process makes, also after one of the two is killed."""
    one = sorted(alone(tmp_path / "one", *SHARDED))
    assert sorted(together(tmp_path / "two", *SHARDED)) == one and len(one) == 3
    assert files(tmp_path / "two") == files(tmp_path / "one")

    again = tmp_path / "again"
    again.mkdir()
    launched = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(ROOT / "run.py"), *SHARDED],
        cwd=again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while launched.poll() is None and len(list(again.rglob("images/*/*.png"))) < 8:
        time.sleep(0.002)
    workers = psutil.Process(launched.pid).children()
    workers[-1].kill()  # torchrun ends the other one
    assert launched.wait(timeout=120) != 0
    made = len(list(again.rglob("images/*/*.png")))
    assert made < 50, "killed too late to show anything"
    assert sorted(together(again, *SHARDED)) == one
    assert files(again) == files(tmp_path / "one")


def pushed_apart(folder, rank, world, gamma=120.0):
    """What a process of several makes where images read earlier ones of their class."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
    )
    work = Work(cache=Path(folder, "cache"), batch_size=4, workers=1, flip="none")
    distiller = GenerativeDistiller(
        Toy(8, mean=0.0, shift=0.05, std=0.3),
        DDIM(steps=4, cfg_scale=2.0, cfg_channels=3),
        DeviationGuidance(gamma, 0, 3, 64),
        KMeansModes(),
        work,
        ranks=Ranks(rank, world),
    )
    provenance = {"method": "m", "config": {}, "identity": {}, "data": {"train": None}}
    distiller.distill(Digits(8, classes=(0, 1, 7)), 5, 0, Path(folder, "set"), provenance)


def test_processes_share_classes_where_images_read_earlier_ones(tmp_path):
    """A process has classes of its own; its images are those that one process makes of all."""
    made = {}
    for name, world, gamma in (("one", 1, 120.0), ("two", 2, 120.0), ("plain", 1, 0.0)):
        folder = tmp_path / name
        folder.mkdir()
        members = [
            MEMBERS.Process(target=pushed_apart, args=(folder, rank, world, gamma))
            for rank in range(world)
        ]
        for process in members:
            process.start()
        for process in members:
            process.join(120)
        made[name] = {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*.png")}
    assert made["one"] == made["two"] and len(made["one"]) == 15
    same = {path for path, data in made["plain"].items() if data == made["one"][path]}
    assert {path.name for path in same} == {"00000.png"}  # which reads none


LEARNED = (
    "backbone=dit_digits", "dataset.classes=[0,1,7]", "ipc=5", "sampler.steps=10",
    "guidance.stop_t=5", "compute.batch_size=8", "tracker=none", "report=false",
    "students=[convnet2_w16]", "student_seeds=2", "protocol.epochs_by_ipc=[[null,60]]",
    "compute.device=cpu", "compute.workers=1",
)  # fmt: skip


def test_two_processes_leave_what_one_leaves(tmp_path):
    """Images, manifest and rows of students that have learned something: chance is 33 %."""
    one, two = alone(tmp_path / "one", *LEARNED), together(tmp_path / "two", *LEARNED)
    assert sorted(two) == sorted(one) and min(top1 for _, top1, *_ in one) > 80
    assert files(tmp_path / "two") == files(tmp_path / "one")
    manifests = [json.loads(next((tmp_path / n).rglob("manifest.json")).read_text()) for n in
                 ("one", "two")]  # fmt: skip
    machines = [manifest.pop("machine") for manifest in manifests]
    assert manifests[0] == manifests[1]
    assert machines[1] == f"2 x {machines[0]}"

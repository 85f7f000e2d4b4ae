"""Scoring and measuring sets that exist: folders made elsewhere, finished sets, what is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from PIL import Image

from eval.external import adopt
from eval.results.rows import read_results
from mgd3.data.class_lists import ClassInfo, read_class_list
from mgd3.data.digits import Digits
from mgd3.runtime.errors import UserError
from mgd3.storage.files import read_json
from scripts.map_guidance import arrivals

SHORT = (
    "dataset=digits", "students=[convnet2_w8]", "protocol.epochs_by_ipc=[[null,2]]",
    "compute.device=cpu", "compute.workers=1",
)  # fmt: skip
METHODS = ("random", "full")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two images per class of the digits, and all of them."""
    folder = tmp_path_factory.mktemp("runs")
    for method in METHODS:
        done = run(folder, *SHORT, f"method={method}", "ipc=2", "tracker=none", "report=false")
        assert done.returncode == 0, done.stderr[-1500:]
    return folder


def test_the_full_set_is_every_training_image(runs):
    (manifest,) = runs.glob("runs/digits/full/*/manifest.json")
    found = read_json(manifest)
    dataset = Digits(8)
    counts = [len(dataset.images("train", label)) for label in range(10)]
    assert found["ipc"] == max(counts) > min(counts)
    assert len(found["images"]) == sum(counts) == 1078
    (row,) = (r for r in read_results(runs) if r.method == "full")
    assert row.ipc == max(counts)


def test_a_finished_set_scored_again_is_the_same_cell_as_its_run(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copy")
    sets = tmp_path / "copy/runs/digits/random"
    (before,) = read_results(sets)
    for path in list(sets.rglob("results.jsonl")):
        shutil.rmtree(path.parent)
    done = run(tmp_path, f"images={sets}", *SHORT, script="scripts/evaluate.py")
    assert done.returncode == 0, done.stderr[-1500:]
    (after,) = read_results(sets)
    assert (after.cell_id, after.run_id, after.method) == (before.cell_id, before.run_id, "random")
    assert after.top1_last == before.top1_last


def folder_of(tmp_path, runs, name_of):
    """The random set's images as somebody else would hand them over."""
    (source,) = runs.glob("runs/digits/random/*/*/images")
    for place in source.iterdir():
        target = tmp_path / "theirs" / name_of(place.name)
        target.mkdir(parents=True)
        for k, file in enumerate(sorted(place.iterdir())):
            Image.open(file).save(target / f"picture {k}.bmp")
    return tmp_path / "theirs"


def test_a_folder_made_elsewhere_scores_as_its_images_do(runs, tmp_path):
    (mine,) = (r for r in read_results(runs) if r.method == "random")
    theirs = folder_of(tmp_path, runs, lambda wnid: f"Digit {wnid}")
    done = run(tmp_path, f"images={theirs}", *SHORT, script="scripts/evaluate.py")
    assert done.returncode == 0, done.stderr[-1500:]
    (row,) = read_results(tmp_path / "runs")
    assert (row.method, row.ipc, row.top1_last) == ("theirs", 2, mine.top1_last)
    report = run(tmp_path, "folder=runs", script="scripts/report.py")
    assert report.returncode == 0, report.stderr[-1500:]
    assert "theirs" in report.stdout


class TwoClasses:
    name, note = "two", None
    classes = read_class_list("imagenette")[:2]  # tench (0), English springer (217)


@pytest.mark.parametrize(
    "names",
    [("n01440764", "n02102040"), ("0", "217"), ("00000", "00217"), ("tench", "English_springer")],
)
def test_class_folders_are_found_by_wnid_index_and_name(tmp_path, names):
    for k, name in enumerate(names):
        (tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4), (k, 0, 0)).save(tmp_path / "in" / name / "x.png")
    found = list(adopt(tmp_path / "in", TwoClasses(), "m", tmp_path / "runs", {}).images())
    assert [(image.getpixel((0, 0))[0], label) for image, label in found] == [(0, 0), (1, 1)]


def test_other_folders_are_refused_with_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        adopt(tmp_path / "none", TwoClasses(), "m", tmp_path / "runs", {})
    for name in ("tench", "cat"):
        (tmp_path / "in" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"folders cat, tench \(2\).*n01440764, index 0, tench"):
        adopt(tmp_path / "in", TwoClasses(), "m", tmp_path / "runs", {})
    (tmp_path / "in/cat").rename(tmp_path / "in/English springer")
    with pytest.raises(UserError, match="tench holds no image"):
        adopt(tmp_path / "in", TwoClasses(), "m", tmp_path / "runs", {})
    picture = tmp_path / "in/tench/x.jpg"
    Image.effect_noise((64, 64), 90).save(picture)
    picture.write_bytes(picture.read_bytes()[:900])  # half a JPEG
    with pytest.raises(UserError, match=r"x\.jpg cannot be read .*not a readable image"):
        adopt(tmp_path / "in", TwoClasses(), "m", tmp_path / "runs", {})
    assert not (tmp_path / "runs").exists()


def test_a_name_of_two_classes_tells_neither(tmp_path):
    class Cranes(TwoClasses):
        classes = (ClassInfo("n1", "crane, bird", 134), ClassInfo("n2", "crane, machine", 517))

    (tmp_path / "in/crane").mkdir(parents=True)
    with pytest.raises(UserError, match=r"class folders crane \(1\), which are not the 2 classes"):
        adopt(tmp_path / "in", Cranes(), "m", tmp_path / "runs", {})


def test_other_test_images_are_another_cell(runs, tree, tmp_path):
    theirs = folder_of(tmp_path, runs, lambda wnid: wnid)
    copy = tmp_path / "digits_tree"
    for split in ("train", "val"):
        for wnid in map(str, range(10)):
            (place,) = runs.glob(f"runs/digits/random/*/*/images/{wnid}")
            shutil.copytree(place, copy / split / wnid)
    elsewhere = ("dataset=folder", f"dataset.root={copy}", "dataset.student_size=8")
    for dataset in (("dataset=digits",), (*elsewhere, "protocol=hard_label_short")):
        done = run(tmp_path, f"images={theirs}", *SHORT[1:], *dataset, script="scripts/evaluate.py")
        assert done.returncode == 0, done.stderr[-1500:]
    rows = read_results(tmp_path / "runs")
    assert {r.test_images for r in rows} == {719, 20}
    assert len({r.cell_id for r in rows}) == 2


def test_sets_of_another_dataset_are_refused(runs, tree, tmp_path):
    options = ("dataset=folder", f"dataset.root={tree}", "students=[convnet2_w8]")
    for script in ("scripts/evaluate.py", "scripts/measure.py"):
        done = run(tmp_path, f"images={runs}", *options, "compute.device=cpu", script=script)
        assert done.returncode == 1
        assert "name its own dataset" in done.stderr
        assert "Traceback" not in done.stderr


def test_measuring_writes_numbers_a_table_and_maps(runs, tmp_path):
    shutil.copytree(runs, tmp_path / "copy")
    options = ("method=random", "ipc=2", "seed=1", "tracker=none", "report=false")
    done = run(tmp_path / "copy", *SHORT, *options)  # another increment
    assert done.returncode == 0, done.stderr[-1500:]
    done = run(
        tmp_path, "images=copy", *SHORT, "metrics=pixels", "redundancy=true", "most_real=20",
        script="scripts/measure.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    small = json.loads((tmp_path / "copy/metrics-pixels-ipc2/metrics.json").read_text())
    (random, second) = small["sets"]["random"]
    assert random != second
    assert 0 < small["redundancy"]["random"] < 100
    assert random["precision"] == 1.0  # they are real images
    assert len(random["diversity"]) == 10
    full = next(p for p in (tmp_path / "copy").glob("metrics-pixels-ipc1*/metrics.json"))
    (everything,) = json.loads(full.read_text())["sets"]["full"]
    assert everything["frechet"] < 1e-6 and everything["coverage"] == 1.0
    folder = tmp_path / "copy/metrics-pixels-ipc2"
    assert "| random |" in (folder / "metrics.md").read_text()
    assert (folder / "maps.svg").read_text().startswith("<svg")


def test_the_space_of_modes_is_a_space_to_measure_in(runs, tmp_path):
    """Digits' codec: the grey pixels in [-1, 1], 64 numbers, whatever the students see."""
    shutil.copytree(runs / "runs/digits/random", tmp_path / "copy")
    options = ("metrics=vae_latents", "backbone=toy", "most_real=20", "class_maps=true")
    done = run(tmp_path, "images=copy", *SHORT, *options, script="scripts/measure.py")
    assert done.returncode == 0, done.stderr[-1500:]
    folder = tmp_path / "copy/metrics-vae_latents-ipc2"
    assert json.loads((folder / "metrics.json").read_text())["space"] == "vae_latents"
    assert (folder / "class_maps.svg").read_text().count("<!-- digit ") == 10
    assert list((tmp_path / "cache/latents").glob("*/*.safetensors"))


NO_CONNECTION = """
from pathlib import Path
import eval.tracking as tracking
tracking.CONNECT_SECONDS = 2.0
tracker = tracking.WandbTracker("p", "online")
with tracker.start("tables-x", "table1", {}, Path("kept")) as run:
    run.log_table("t", ["a"], [["a number to find"]])
"""


def test_without_a_connection_the_record_stays_here(tmp_path):
    """There is an account, but nobody answers."""
    done = subprocess.run(
        [sys.executable, "-c", NO_CONNECTION],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env=os.environ | {
            "WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9",
            "PYTHONPATH": str(ROOT), "HOME": str(tmp_path),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "recording offline in kept/wandb" in done.stderr
    (record,) = (tmp_path / "kept").rglob("offline-run-*/*.wandb")
    assert b"table1" in record.read_bytes()


def test_images_at_the_modes_of_their_index_are_counted():
    modes = [torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0], [9.0, 5.0]])]
    assert arrivals(modes, modes) == {"distance to its mode": 0, "at its mode": 1}
    moved = [modes[0], modes[1] + torch.tensor([8.0, 0.0])]  # its first image is at 8, nearer to 9
    assert arrivals(moved, modes) == {"distance to its mode": 4, "at its mode": 0.75}
    assert arrivals(modes, []) == {}


def test_what_guidance_gains_is_drawn_over_three_keys(tmp_path):
    sweep = (
        "-m", "dataset=digits_parity", "method=mgd3", "ipc=2", "students=[]", "sampler.steps=12",
        "sampler.cfg_scale=1", "guidance.stop_t=0,6", "guidance.scale=0,0.2", "seed=0",
        "tracker=none", "runs=r",
    )  # fmt: skip
    assert run(tmp_path, *sweep).returncode == 0
    words = ("r", "dataset=digits_parity", "metrics=vae_latents")
    done = run(tmp_path, *words, script="scripts/map_guidance.py")
    assert done.returncode == 0, done.stderr
    content = read_json(tmp_path / "r/guidance_map-vae_latents.json")
    far, shown, at_it = (
        {tuple(g["place"][1:]): g["mean"] for g in content["gains"] if g["measure"] == measure}
        for measure in ("distance to its mode", "modes shown", "at its mode")
    )
    assert set(far) == set(shown) == set(at_it) == {(0, 0.2), (6, 0.2)}
    assert far[0, 0.2] < far[6, 0.2] < 0, "the longer a sample is steered, the nearer"
    assert (tmp_path / "r/guidance_map-vae_latents.png").read_bytes().startswith(b"\x89PNG")
    two = run(tmp_path, *words, "by=[guidance.scale,seed]", script="scripts/map_guidance.py")
    assert two.returncode == 1 and "a map has three keys" in two.stderr

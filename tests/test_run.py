"""The command line as a user meets it: whole runs, resumption after SIGKILL, refusals."""

import hashlib
import json
import os
import signal
import subprocess
import threading
import time

import pytest
import torch
from conftest import QUICK, command, run

from eval.reports.samples import overview_panels
from mgd3.data.distilled import DistilledDataset
from mgd3.data.pixels import to_pixels
from mgd3.data.previews import load_previews
from mgd3.storage.files import exclusive
from mgd3.storage.tensors import load_tensors

SLOW_ENOUGH = ("sampler.steps=150", "compute.batch_size=10", "student_seeds=2")


def images(folder):
    files = sorted(folder.rglob("images/*/*.png"))
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def scores(folder):
    (path,) = folder.rglob("results.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return sorted((r["student"], r["student_seed"], r["top1_last"], r["top1_best"]) for r in rows)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("finished")
    done = run(cwd, *QUICK, *SLOW_ENOUGH)
    assert done.returncode == 0, done.stderr
    return cwd


def test_a_run_leaves_a_dataset_scores_and_a_table(finished):
    (manifest,) = finished.rglob("manifest.json")
    content = json.loads(manifest.read_text())
    assert manifest.parent.parent == finished / "runs/digits/mgd3/ipc10"
    assert len(content["images"]) == len(images(manifest.parent)) == 100
    assert content["config"]["guidance"]["scale"] == 0.1
    assert len(scores(finished)) == 2
    (summary,) = finished.rglob("summary.json")
    assert json.loads(summary.read_text())["rows"][0]["n"] == 2
    assert {f.stem for f in (manifest.parent / "modes").iterdir()} == {
        *map(str, range(10)),
        "previews",
    }


def test_the_same_command_does_nothing_again(finished):
    before = {f: f.stat().st_mtime_ns for f in finished.rglob("images/*/*.png")}
    rows = scores(finished)
    again = run(finished, *QUICK, *SLOW_ENOUGH)
    assert again.returncode == 0, again.stderr
    assert {f: f.stat().st_mtime_ns for f in finished.rglob("images/*/*.png")} == before
    assert scores(finished) == rows
    assert len(list(finished.rglob("manifest.json"))) == 1


def everything(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_plan_says_what_is_there_and_does_nothing(finished):
    before = everything(finished)
    done = run(finished, *QUICK, *SLOW_ENOUGH, "plan=true")
    assert done.returncode == 0, done.stderr
    assert "there  the distilled set, 100 images" in done.stdout
    assert "there  2 of 2 students are trained" in done.stdout and "nothing to do" in done.stdout
    more = run(finished, *QUICK, *SLOW_ENOUGH, "plan=true", "student_seeds=3")
    assert "to do  trains a student (convnet2_w8) on 100 images for 3 epochs: about" in more.stdout
    assert everything(finished) == before


def test_a_plan_names_what_comes_first_and_what_shortens_it(tmp_path):
    done = run(tmp_path, *QUICK, "plan=true", "method=herding", "features.epochs=77")
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if "trains convnet3_w64" in line)
    assert "on 1,078 real images for 77 epochs: about" in first
    assert "a guess from one batch tried now); features.epochs=… or features.student=…" in first
    new = run(tmp_path, *QUICK, "plan=true", "ipc=3", "sampler.steps=7", "guidance.stop_t=2")
    assert "encodes 1,078 real images as latents: never timed" in new.stdout
    assert (
        "samples 30 images in 7 steps each, 4 of them guided: never timed on this machine"
        in new.stdout
    )
    assert not list(tmp_path.iterdir())
    wrong = run(tmp_path, *QUICK, "plan=maybe")
    assert (
        wrong.returncode == 1
        and "plan='maybe' is unknown. Allowed: true, false, a100x1" in wrong.stderr
    )


def test_a_report_is_made_when_something_changed_and_in_a_sweep_when_asked(tmp_path):
    tiny = (*QUICK, "method=random", "dataset.classes=[0,1]", "ipc=2")
    said = [run(tmp_path, *tiny, "report=null", *more).stdout for more in ((), (), ("seed=1",))]
    assert ["report.html" in out for out in said] == [True, False, True]
    (first, *_), written = sorted(tmp_path.rglob("report.html")), "writing "
    before = first.stat().st_mtime_ns
    more = run(tmp_path, *tiny, "report=null", "student_seeds=2")
    assert written in more.stdout and first.stat().st_mtime_ns != before
    swept = run(tmp_path, "-m", *tiny, "report=null", "seed=2")
    assert swept.returncode == 0 and written not in swept.stdout
    asked = run(tmp_path, "-m", *tiny, "report=true", "seed=2")
    assert asked.returncode == 0 and written in asked.stdout
    assert len(list(tmp_path.rglob("report.html"))) == 3


def test_a_killed_run_ends_as_an_uninterrupted_one(finished, tmp_path):
    """By a signal, between two writes; tests/test_resumption.py dies at each of them."""
    process = subprocess.Popen(
        command(*QUICK, *SLOW_ENOUGH),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and len(list(tmp_path.rglob("*.png"))) < 15:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not list(tmp_path.rglob("images/9/00009.png")), "killed too late to show anything"
    kept = {f: f.stat().st_mtime_ns for f in tmp_path.rglob("images/*/*.png")}

    resumed = run(tmp_path, *QUICK, *SLOW_ENOUGH)
    assert resumed.returncode == 0, resumed.stderr
    assert images(tmp_path) == images(finished)
    assert scores(tmp_path) == scores(finished)
    unchanged = [f for f, when in kept.items() if f.stat().st_mtime_ns == when]
    assert len(unchanged) >= len(kept) - 10  # all but the batch that was being written


def test_two_runs_of_one_identity_do_not_meet(finished):
    (results,) = finished.rglob("results.jsonl")
    with exclusive(results.parent):  # as a first run does
        second = run(finished, *QUICK, *SLOW_ENOUGH)
    assert second.returncode == 1
    assert "another process is running this very configuration" in second.stderr
    assert "Traceback" not in second.stderr


def test_a_sweep_waits_for_a_run_of_the_same_identity(finished):
    """Two tables may meet in a set; nobody is there to start the second one again."""
    (results,) = finished.rglob("results.jsonl")
    held = threading.Event()

    def first_run():
        with exclusive(results.parent):
            held.set()
            time.sleep(3)

    holder = threading.Thread(target=first_run)
    holder.start()
    held.wait()
    sweep = run(finished, "-m", *QUICK, *SLOW_ENOUGH)
    assert not holder.is_alive(), "it did not wait"
    assert sweep.returncode == 0, sweep.stderr
    assert "waiting for it" in sweep.stdout


def test_a_sweep_and_its_report(tmp_path):
    sweep = run(tmp_path, "-m", *QUICK, "method=random,unguided,closest_real", "seed=0,1")
    assert sweep.returncode == 0, sweep.stderr
    assert len(list(tmp_path.rglob("manifest.json"))) == 5  # closest_real has no randomness
    report = run(tmp_path, "folder=runs", script="scripts/report.py")
    assert report.returncode == 0, report.stderr
    rows = json.loads((tmp_path / "runs/summary.json").read_text())["rows"]
    assert {(r["method"], r["n"]) for r in rows} == {
        ("random", 2), ("unguided", 2), ("closest_real", 1),
    }  # fmt: skip
    html = (tmp_path / "runs/report.html").read_text()
    assert html.count("data:image/png;base64,") >= 30
    assert "<svg" in html
    assert 'src="http' not in html and 'href="http' not in html
    assert 'name="viewport"' in html


def test_the_overview_keeps_the_order_of_classes(finished):
    """Panels are rows of classes; a file's own order of tensors must not show."""
    (manifest,) = finished.rglob("manifest.json")
    distilled = DistilledDataset(manifest.parent)
    previews = load_previews(distilled.folder)
    assert sorted(previews) == sorted(c.wnid for c in distilled.classes)
    for wnid, (centroids, nearest) in previews.items():
        modes = load_tensors(distilled.folder / "modes" / f"{wnid}.safetensors")
        decoded = to_pixels(modes["centers"].expand(-1, 3, -1, -1))
        assert torch.equal(centroids, decoded)
        assert len(nearest) == 10
    panels = overview_panels([distilled], ["mgd3"], real=True)
    assert list(panels) == ["mode centroids, decoded", "nearest real images", "mgd3"]
    for label, info in enumerate(distilled.classes):
        rows = panels["mode centroids, decoded"][10 * label : 10 * label + 10]
        assert torch.equal(rows, previews[info.wnid][0])


def test_an_explicit_folder_is_honoured_and_guarded(tmp_path):
    here = tmp_path / "here"
    first = run(tmp_path, *QUICK, f"hydra.run.dir={here}", "method=random", "ipc=2")
    assert first.returncode == 0, first.stderr
    assert (here / "images/0/00001.png").is_file()
    assert (here / "results.jsonl").is_file()
    other = run(tmp_path, *QUICK, f"hydra.run.dir={here}", "method=random", "ipc=3")
    assert other.returncode == 1
    assert "ipc=3 (there: 2)" in other.stderr
    assert not (here / "images/0/00002.png").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "guidance.scal=0.2",
            "guidance.scal is not a key of this configuration. Did you mean scale?",
        ),
        ("ipc=ten", "ipc='ten' is not an integer; allowed: >= 1"),
        (
            "ipc=200",
            "class 8 (digit 8), the smallest of dataset=digits, has 104 usable train "
            "images, fewer than the 200 needed; ipc=104 is the largest possible here",
        ),
        ("ipc=0", "ipc=0 is out of range; allowed: >= 1"),
        ("dataset=imagenete", "imagenette"),
        ("dataset=imagenette", "dataset.root is not set"),
        ("students=[resnt18]", "Did you mean resnet18?"),
        ("protocol.epochs_by_ipc=20", "write protocol.epochs_by_ipc=[[10,200],[null,100]]"),
        ("students=[convnet9]", "convnet9 halves 8 px 9 times"),
        ("seed=-1", "seed=-1 is out of range"),
    ],
)
def test_mistakes_are_explained_before_any_work(tmp_path, override, message):
    refused = run(tmp_path, "tracker=none", override, IMAGENET_DIR=None)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_lists_what_there_is(tmp_path):
    text = run(tmp_path, "--help").stdout
    for word in ("imagenette", "closest_real", "guidance.scale", "dataset.root", "resumes"):
        assert word in text


@pytest.mark.parametrize("words", [("--help",), ("dataset=digits", "--cfg", "job")], ids=" ".join)
def test_a_reader_who_has_seen_enough_is_no_error(tmp_path, words):
    """As with «| head»: nothing is said, and the process ends as any that a closed pipe ends."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command(*words), cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_weights_and_biases_records_offline_beside_the_sets_not_in_them(tmp_path):
    """Readers of the set's folder must find neither a record's pictures nor candidates."""
    from datasets import load_dataset

    environment = {"HOME": str(tmp_path), "WANDB_API_KEY": None, "WANDB_MODE": None}
    quick = [o for o in QUICK if not o.startswith("tracker")]
    few = ("sampler.steps=4", "backbone.sampling.stop_t=2")
    done = run(tmp_path, *quick, *few, "method=unguided", "ipc=2", "pool=2", **environment)
    assert done.returncode == 0, done.stderr
    (record,) = tmp_path.glob("runs/wandb/offline-run-*/*.wandb")
    assert record.stat().st_size > 1000 and list(record.parent.rglob("*.png"))
    assert f"wandb sync {record.parent.relative_to(tmp_path)} (docs/tracking.md)" in done.stdout
    (manifest,) = tmp_path.glob("runs/*/*/ipc2/*/manifest.json")
    read = load_dataset(
        "imagefolder", data_dir=str(manifest.parent), cache_dir=str(tmp_path / "hf")
    )
    assert list(read) == ["train"]
    labels, entries = read["train"]["label"], DistilledDataset(manifest.parent).manifest["images"]
    names = read["train"].features["label"].names
    assert sorted(names[k] for k in labels) == sorted(entry["wnid"] for entry in entries)


def test_what_makes_no_image_names_no_backbone(tmp_path):
    done = run(tmp_path, "method=random", "ipc=1", "students=[]", "tracker=none")
    assert done.returncode == 0, done.stderr
    assert "digits: protocol=hard_label_short, compute=small unless told otherwise" in done.stdout
    (card,) = tmp_path.rglob("README.md")
    assert not [
        word for word in ("backbone", "dit_digits") if word in done.stdout + card.read_text()
    ]

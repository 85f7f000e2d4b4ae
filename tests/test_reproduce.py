"""Tables of the paper in rehearsal: run, reported, planned, resumed, sent to a launcher."""

import csv
import re
import shutil
import subprocess
import sys

import pytest
from conftest import run

from eval.scoring import missing_rows
from mgd3.config.grid import Experiment
from mgd3.config.identity import register
from mgd3.data.distilled import DistilledDataset


@pytest.fixture(scope="module", autouse=True)
def _schemas():
    register()


def rehearsal(name, **only):
    return Experiment(f"mgd3/{name}", (), only, True)


def reproduce(cwd, *arguments, **environment):
    return run(cwd, *arguments, script="scripts/reproduce.py", **environment)


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Tables 5, 6, 7 and 1 on digits, in one folder, seed 0; of Table 1 the first IPC."""
    cwd = tmp_path_factory.mktemp("rehearsed")
    for number in (5, 6, 7, 1):
        few = ["only.ipc=10,full", "only.dataset=imagenette"]
        only = ["only.seed=0", *(few if number == 1 else [])]
        done = reproduce(cwd, f"table={number}", "rehearsal=true", *only)
        assert done.returncode == 0, done.stderr
    return cwd


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("number", "rows"), [(1, 11), (5, 6), (6, 12), (7, 9)])
def test_tables_are_rehearsed_to_the_end(rehearsed, number, rows):
    folder = rehearsed / f"runs/rehearsal/tables/table{number}"
    records = list(csv.DictReader((folder / "table.csv").open()))
    experiment = rehearsal(f"table{number}")
    named = {r["method"].removeprefix("'") for r in records}  # what would be a formula is quoted
    assert named == set(experiment.table.rows)
    assert len({r["method"] for r in records}) == rows
    for r in records:
        left_out = r["ipc"] in ("20", "50") or r["dataset"] == "imageidc"
        assert (r["n"] == "0") == (number == 1 and left_out)
        assert r["n"] == "0" or 5 < float(r["ours_best_mean"]) <= 100
        assert not r["paper_mean"], "a rehearsal compares with nothing"
    page = (folder / "table.md").read_text()
    assert "Nothing here compares with the paper" in page
    html = (folder / "report.html").read_text()
    assert 'src="http' not in html and "<svg" in html and html.count("data:image/") >= rows * 10


def test_finished_cells_never_run_again(rehearsed):
    """And their tables go to Weights & Biases, here without an account or a connection."""
    rows = {f: f.stat().st_mtime_ns for f in rehearsed.rglob("results.jsonl")}
    environment = {"HOME": str(rehearsed), "WANDB_API_KEY": None, "WANDB_MODE": None}
    again = reproduce(
        rehearsed, "table=5", "rehearsal=true", "only.seed=0", "tracker=wandb", **environment
    )
    assert again.returncode == 0 and "0 to do" in again.stdout
    assert {f: f.stat().st_mtime_ns for f in rehearsed.rglob("results.jsonl")} == rows
    (record,) = (rehearsed / "runs/rehearsal/wandb").glob("offline-run-*/*.wandb")
    content = record.read_bytes()
    assert b"table5" in content and b"diversity, imagenette, ipc 10" in content
    assert b"tables-table5" in content and b"runs/rehearsal/tables/table5/table.csv" in content
    (first, *_) = rehearsed.rglob("manifest.json")
    assert DistilledDataset(first.parent).label.encode() in content


def test_a_plan_starts_nothing(rehearsed):
    before = sorted(rehearsed.rglob("*"))
    plan = reproduce(rehearsed, "table=5", "rehearsal=true", "plan=true")
    assert plan.returncode == 0, plan.stderr
    assert sorted(rehearsed.rglob("*")) == before
    last = re.search(r"all +(\d+) +(\d+) +(\d+) +(\d+) +([\d.]+ s)", plan.stdout)
    assert last, plan.stdout
    assert last.groups()[:4] == (
        "6",
        "4",
        "80",
        "12",
    )  # seed 1 of the four rows that draw


def test_a_half_written_run_is_counted_as_far_as_it_is_there(rehearsed, tmp_path):
    for part in ("runs", "cache"):
        run_dir = rehearsed / part
        if run_dir.is_dir():
            shutil.copytree(run_dir, tmp_path / part)
    (results,) = (
        p / "results.jsonl"
        for p in [place.folder for place in rehearsal("table5", row=["DiT"], seed=["0"]).located]
    )
    path = tmp_path / results
    text = path.read_text()
    path.write_text(text[: len(text) - 20])  # the last student's line is cut short
    made = run(tmp_path, "table=5", "rehearsal=true", script="scripts/make_tables.py")
    assert made.returncode == 0, made.stderr
    records = csv.DictReader((tmp_path / "runs/rehearsal/tables/table5/table.csv").open())
    counted = {(r["method"], r["student"]): (r["n"], r["asked"]) for r in records}
    assert counted["DiT", "resnet18"] == ("0", "2")
    assert counted["DiT", "convnet6"] == ("1", "2")
    places = rehearsal("table5", seed=["0"]).located
    pending = [p for p in places if missing_rows(tmp_path / p.folder, list(p.wanted))]
    assert [(p.job.row, p.job.seed) for p in pending] == [("DiT", 0)]


def test_images_that_are_not_there_are_named_once(tmp_path):
    refused = reproduce(tmp_path, "table=1", "only.ipc=10", "only.row=DiT", IMAGENET_DIR=None)
    assert refused.returncode == 1
    assert refused.stderr.count("dataset.root is not set") == 2, "once for each dataset"
    assert len(refused.stderr.splitlines()) == 1
    assert not list(tmp_path.rglob("*.yaml")) and not (tmp_path / "runs").exists()
    named = reproduce(tmp_path, "table=1", "only.ipc=10", "only.row=DiT", "dataset.root=elsewhere")
    assert named.stderr.strip() == "error: dataset.root=elsewhere does not exist or is no folder"


def test_a_failed_cell_leaves_the_others(tmp_path):
    """λ = 1e9 is no number for any sample that is guided; the others do not feel it."""
    done = reproduce(
        tmp_path, "table=5", "rehearsal=true", "only.seed=0", "guidance.scale=1e9",
        'only.row="+ stop guidance","Random (seeded)"',
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "is not finite" in done.stderr
    assert re.search(r"\+ stop guidance, imagenette, ipc 10, seed 0 \(.*run\.log\)", done.stderr)
    assert "1 of 2 runs of table5 are missing" in done.stderr
    (log,) = tmp_path.glob("runs/rehearsal/digits/mgd3/*/*/*/run.log")
    assert "failed: the sample of class 0" in log.read_text()
    assert len(list(tmp_path.rglob("results.jsonl"))) == 1
    (page,) = tmp_path.glob("runs/rehearsal/tables/table5-*/table.md")  # not the plain table's
    table = page.read_text()
    assert "Run with guidance.scale=1e9" in table
    assert "Row DiT cannot be run so: guidance.scale is not a key" in table


def launched(cwd, python):
    """What a run comes to that Hydra's launcher starts with `python`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        return reproduce(
            cwd, "table=5", "rehearsal=true", 'only.row="Random (seeded)"', "only.seed=0",
            "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5",
        )  # fmt: skip


def test_jobs_go_where_the_launcher_sends_them(tmp_path):
    done = launched(tmp_path, sys.executable)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("results.jsonl"))) == 1
    assert len(list(tmp_path.rglob("*_result.pkl"))) == 1, "in a process of its own"


def test_a_node_without_the_packages_is_named(tmp_path):
    """The launcher's processes start a Python that has nothing installed."""
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    said = launched(tmp_path, bare / "bin/python")
    assert said.returncode == 1
    assert "the launcher lost a job" in said.stderr and "without the packages?" in said.stderr
    assert not list(tmp_path.rglob("results.jsonl"))

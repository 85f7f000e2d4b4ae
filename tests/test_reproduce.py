"""Tables of the paper in rehearsal: run, reported, planned, resumed, sent to a launcher."""

import csv
import re
import shutil
import subprocess
import sys

import pytest
import submitit
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
        assert "Table " in done.stdout and "Nothing here compares with the paper" in done.stdout
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
    assert re.search(r"^ \+ stop guidance +\d+\.\d ± – \(1\) ", again.stdout, re.M), again.stdout
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


def test_a_cell_says_where_its_number_comes_from(rehearsed):
    """Before and after it ran: seed 0 is done, seed 1 is not."""
    before = sorted(rehearsed.rglob("*"))
    cell = "explain=+ stop guidance, imagenette, 10"
    told = reproduce(rehearsed, "table=5", "rehearsal=true", cell)
    assert told.returncode == 0, told.stderr
    assert sorted(rehearsed.rglob("*")) == before
    assert "rehearsal=true 'only.row=\"+ stop guidance\"' only.dataset=imagenette" in told.stdout
    folders = re.findall(r"seed (\d): (done|missing), (\S+)", told.stdout)
    above = re.search(r"^folder +(\S+)$", told.stdout, re.M)[1]
    assert [f[:2] for f in folders] == [("0", "done"), ("1", "missing")]
    assert [(rehearsed / above / f[2]).is_dir() for f in folders] == [True, False]
    images = re.findall(r"^ +(\S+/images)$", told.stdout, re.M)
    assert len(list((rehearsed / images[0]).glob("*/*.png"))) == 20
    for line in (
        "epochs_by_ipc=[[20,40],[null,4]]", "epochs 40, batch size 64", "2 images per class",
        "convnet6: 59.6 ± 2.2", "do not compare", "n = 1 of 2",
        "guidance=mode: scale=0.1, stop_t=25",
        "modes=kmeans: random_state=0", "sampler=ddpm: steps=50",
        "convnet2_w8, in place of convnet6, student seed 0:",
    ):  # fmt: skip
        assert line in told.stdout, line
    assert len(re.findall("^ours ", told.stdout, re.M)) == 1
    records = list(csv.DictReader((rehearsed / "runs/rehearsal/tables/table5/table.csv").open()))
    (own, *_) = (r for r in records if "+ stop guidance" in r["method"])
    assert own["command"] in told.stdout
    sets = own["folder"].split("; ")
    assert (rehearsed / "runs/rehearsal/tables/table5" / sets[0] / "manifest.json").is_file()
    html = (rehearsed / "runs/rehearsal/tables/table5/report.html").read_text()
    assert f'<a href="{sets[0]}">' in html and 'href="table.csv"' in html


def test_an_unknown_cell_is_answered_with_those_that_there_are(tmp_path):
    asked = reproduce(tmp_path, "table=1", "explain=DiT+MGD, imagenete, 11")
    assert asked.returncode == 1
    assert "no row «DiT+MGD» and no dataset «imagenete» and no ipc «11»" in asked.stderr
    assert re.search(r"rows: DiT\+MGD3, .*; datasets: imagenette, .*; ipc: 10, 20,", asked.stderr)
    full = reproduce(tmp_path, "table=1", "explain=FullDataset, imagenette, 10")
    assert "its cells: imagenette, full; imageidc, full" in full.stderr
    short = reproduce(tmp_path, "table=1", "explain=DiT")
    assert 'write explain="ROW, DATASET, IPC"' in short.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_was_only_printed_is_filtered_too_and_an_empty_table_says_what_to_do(tmp_path):
    options = ("table=1", "only.dataset=imagenette", "only.ipc=10", "tracker=none")
    made = run(tmp_path, *options, script="scripts/make_tables.py", COLUMNS="80")
    assert made.returncode == 0, made.stderr
    assert "66.4 ± 2.4" in made.stdout
    assert "71.2 ± 0.5" not in made.stdout and "imageidc" not in made.stdout
    assert "python scripts/reproduce.py table=1 plan=true" in " ".join(made.stdout.split())
    html = (tmp_path / "runs/tables/table1/report.html").read_text()
    assert "Nothing of it has been run yet" in html and "55.9 ± 2.1" in html
    for heading in ("Mean seconds", "Runs</h2>", "Configuration", "Accuracy</h2>"):
        assert heading not in html


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


def test_a_plan_names_the_images_and_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    asked = ("table=8", "only.ipc=10", "only.row=Random,DiT", "plan=true", "students=[]")
    done = reproduce(tmp_path, *asked, IMAGENET_DIR=None)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "Not ready: dataset.root is not set" in text
    assert "Not ready: backbone.weights=facebook/DiT-XL-2-256: these weights are not" in text
    assert text.count("Not ready: backbone.vae=stabilityai/sd-vae-ft-mse") == 1


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


ONE_JOB = "table=5", "rehearsal=true", 'only.row="Random (seeded)"', "only.seed=0"
IMAGES = "runs/rehearsal/digits/**/images/*/*.png"


def launched(cwd, python):
    """What a run comes to that Hydra's launcher starts with `python`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(python))
        return reproduce(
            cwd, *ONE_JOB,
            "hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5",
        )  # fmt: skip


def test_jobs_go_where_the_launcher_sends_them(rehearsed, tmp_path):
    done = launched(tmp_path, sys.executable)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("results.jsonl"))) == 1
    assert len(list(tmp_path.rglob("*_result.pkl"))) == 1, "in a process of its own"
    images = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.glob(IMAGES)}
    assert len(images) == 20, "and the same bytes as in one process"
    assert all((rehearsed / path).read_bytes() == content for path, content in images.items())


def test_a_node_without_the_packages_is_named(tmp_path, monkeypatch):
    """The launcher's processes start a Python that has nothing installed."""
    # how long the launcher waits for a result that a slow file system may still hide
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 1)
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    said = launched(tmp_path, bare / "bin/python")
    assert said.returncode == 1
    assert "the launcher lost a job" in said.stderr and "without the packages?" in said.stderr
    assert not list(tmp_path.rglob("results.jsonl"))

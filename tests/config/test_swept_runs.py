"""Sweeps: what a method does not read is carried past it, and one run is made once."""

import csv
import json
import subprocess

import pytest
from conftest import QUICK, apart, run

from eval.results.rows import read_results
from mgd3.config import run_folder
from mgd3.runtime import machine
from mgd3.runtime.machine import Checkout

SETS = (*QUICK[:3], "students=[]", "ipc=1")


def sets(folder):
    return sorted(str(f.parent.relative_to(folder)) for f in folder.rglob("manifest.json"))


def test_a_key_is_carried_past_methods_that_have_none(tmp_path):
    done = run(
        tmp_path, "-m", *SETS, "method=mgd3,unguided,random", "guidance.stop_t=4", "sampler.steps=9"
    )
    assert done.returncode == 0, done.stderr
    assert [s.split("/")[2] for s in sets(tmp_path)] == ["mgd3", "random", "unguided"]
    assert "guidance.stop_t is left out of runs with guidance=none" in done.stdout


def test_guidance_that_no_step_feels_is_said(tmp_path):
    done = run(tmp_path, "-m", *SETS, "guidance.stop_t=3,9", "sampler.steps=9")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("guides none of") == 1
    assert "stop_t=9 guides none of the 9 steps (8 to 0" in done.stdout


def test_a_key_of_no_default_group_is_carried_too(tmp_path):
    done = run(
        tmp_path,
        *("-m", *SETS, "method=random,d4m", "start.strength=0.5", "dataset.root=hf://a/b"),
    )
    assert done.returncode == 1 and "dataset.root: no run of this sweep" in done.stderr
    done = run(tmp_path, "-m", *SETS, "method=random,d4m", "start.strength=0.5", "sampler.steps=9")
    assert done.returncode == 0, done.stderr
    assert len(sets(tmp_path)) == 2 and "left out of runs with start=noise" in done.stdout


def test_combinations_that_are_one_run_are_made_once_and_said(tmp_path):
    done = run(
        tmp_path, "-m", *SETS, "method=random,mgd3", "guidance.scale=0.1,0.2",
        "modes=kmeans,random_real",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [s.split("/")[2] for s in sets(tmp_path)] == ["mgd3"] * 4 + ["random"]
    assert done.stdout.count("does not read") == 1, done.stdout
    assert "method=random does not read guidance.scale, modes" in done.stdout
    assert "(3 of 8 combinations left out)" in done.stdout
    assert done.stdout.rstrip().endswith("5 runs are there")  # without students nothing to compare


def test_rows_name_the_commit_of_the_code_that_ran_not_of_a_later_one(tmp_path, monkeypatch):
    def git(*words):
        done = subprocess.run(["git", "-C", project, *words], check=True, capture_output=True)
        return done.stdout.decode().strip()

    def commit(text):
        (project / "code").write_text(text)
        git("add", "code")
        git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", text)
        return git("rev-parse", "--short=12", "HEAD")

    project = tmp_path / "project"
    project.mkdir()
    git("init", "-q")
    first, checkout = commit("one"), Checkout(project)
    for module in (machine, run_folder):
        monkeypatch.setattr(module, "CHECKOUT", checkout)
    few = (*QUICK, "ipc=1", "method=random")
    done = run(tmp_path, *few, "seed=0")
    assert done.returncode == 0 and "the project is at" not in done.stdout
    second = commit("two")
    done = run(tmp_path, *few, "seed=1")
    assert done.returncode == 0, done.stderr
    assert f"the project is at commit {second} now" in done.stdout and f"of {first}," in done.stdout
    done = run(tmp_path, *few, "seed=2")
    assert done.returncode == 0 and "the project is at" not in done.stdout, "said once"
    rows = [json.loads(f.read_text()) for f in tmp_path.rglob("results.jsonl")]
    assert [row["commit"] for row in rows] == [first] * 3
    assert Checkout(tmp_path).commit == "unknown" and Checkout(tmp_path).moved() is None


def test_a_sweep_ends_with_the_command_that_compares_its_runs(tmp_path):
    few = ("students=[convnet1_w4]", "ipc=1", "protocol.epochs=1")
    sweep = (*QUICK[:3], *few, "method=random,mgd3", "guidance.scale=0.1,0.2")
    done = run(tmp_path, "-m", *sweep, "plan=true")
    assert done.returncode == 0 and "runs are there" not in done.stdout
    done = run(tmp_path, "-m", *sweep)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-1].partition("3 runs are there; side by side: ")[2]
    assert said == "python scripts/compare.py runs/digits by=[guidance.scale]"
    files = ("markdown=tables.md", "rows=rows.csv")
    done = run(tmp_path, *said.split()[2:], *files, script="scripts/compare.py")
    assert done.returncode == 0, done.stderr
    tables = (tmp_path / "tables.md").read_text()
    assert "mgd3 scale=0.2" in done.stdout and "mgd3 scale=0.2" in tables
    with (tmp_path / "rows.csv").open() as file:
        written = [(row["method"], float(row["top1_last"])) for row in csv.DictReader(file)]
    (own,) = (r.top1_last for r in read_results(tmp_path / "runs") if r.method == "random")
    assert [name for name, _ in written] == ["mgd3 scale=0.1", "mgd3 scale=0.2", "random"]
    assert written[-1] == ("random", own)
    done = run(tmp_path, "runs/digits", "rows=runs", script="scripts/compare.py")
    assert done.returncode == 1 and "rows=runs is a folder; name a file" in done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("method=unguided,d4m", "guidance.scale=0.1,0.2"), "no run of this sweep has such a key"),
        (("method=unguided,mgd3", "guidance.scal=0.1"), "guidance.scal is not a key"),
        (("method=unguided,mgd3", "guidance.scale=interval(0,1)"), "takes values or range"),
    ],
)
def test_what_no_run_reads_is_refused_before_any(tmp_path, given, said):
    done = run(tmp_path, "-m", *SETS, *given)
    assert done.returncode == 1 and said in done.stderr and not sets(tmp_path)
    assert not list(tmp_path.rglob("*.yaml")), "no record of a sweep that was not begun"


def test_a_key_that_another_choice_has_is_answered_with_it(tmp_path):
    done = run(tmp_path, "method=unguided", "guidance.stop_t=4")
    assert done.returncode == 1
    assert "guidance=mode and guidance=mode_tangent have it" in done.stderr
    assert list(tmp_path.iterdir()) == []
    one = run(tmp_path, "guidance.tangent_neighbors=30")
    assert "guidance=mode_tangent has it; leave it out, or choose it" in one.stderr


def test_a_plan_of_a_sweep_leaves_nothing(tmp_path):
    done = run(tmp_path, "-m", *SETS, "method=random,mgd3", "plan=true", "runs=planned")
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("planned/**/*") if path.is_file()]


def test_runs_side_by_side_make_the_same_sets_and_say_which_failed(tmp_path):
    """Hydra's joblib launcher: one bar here, each run's lines in its folder, the first error."""
    sweep = (*SETS, "method=random", "report=false")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = run(tmp_path / "one", *sweep, "seed=0")
    assert one.returncode == 0, one.stderr
    beside = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    done = apart(tmp_path / "two", "-m", *sweep, "seed=0,-1", *beside)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert done.stdout.count("random, seed -1 has failed: seed=-1") == 1, done.stdout
    assert "runs side by side: 2 runs in" in done.stdout
    assert done.stderr.startswith("error: seed=-1") and done.stderr.count("\n") == 1
    assert sets(tmp_path / "two") == sets(tmp_path / "one")
    for file in sorted((tmp_path / "one").rglob("*.png")):
        twin = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert twin.read_bytes() == file.read_bytes()
    (log,) = (tmp_path / "two").rglob("run.log")
    assert "distilled dataset:" in log.read_text() and "distilled dataset:" not in done.stdout

"""What may be typed: help of every script, words that a shell has cut, refusals."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, seeing_gpus

from mgd3.config.arguments import understood
from mgd3.config.scripts import SCRIPTS
from mgd3.runtime.errors import UserError

# Runs each script's own words in one process, and says whether torch was loaded for it.
WORDS = """
import contextlib, io, runpy, sys
for line in sys.stdin.read().splitlines():
    sys.argv = line.split("\\t")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
    print(sys.argv[0], code, "torch" in sys.modules, repr(out.getvalue()), sep="\\t")
"""


def said(*commands, **environment):
    """By command: exit code, and what is printed; none of them loads torch."""
    done = subprocess.run(
        [sys.executable, "-c", WORDS],
        input="\n".join("\t".join([str(ROOT / c[0]), *c[1:]]) for c in commands),
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        script, code, has_torch, text = line.split("\t")
        assert has_torch == "False", script
        found.append((int(code), ast.literal_eval(text)))
    assert len(found) == len(commands)
    return found


def test_every_command_below_scripts_has_an_entry():
    files = [p for p in ROOT.glob("scripts/*.py") if '__name__ == "__main__"' in p.read_text()]
    assert {p.stem for p in files} | {"run"} == set(SCRIPTS)


def test_every_script_explains_itself_without_torch():
    answers = said(*[(script.file, "--help") for script in SCRIPTS.values()])
    assert len({text for _, text in answers}) == len(SCRIPTS)
    for script, (code, text) in zip(SCRIPTS.values(), answers, strict=True):
        assert code == 0
        assert f"  python {script.file} " in text or script.name == "config"
        assert re.search(r"^Writes ", text, re.M), script.file
        for key in script.own.values():
            assert re.search(rf"^  {re.escape(key.name)}\b", text, re.M), key
            assert key.says or key.name.startswith("train."), f"{script.file}: {key.name}"


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_the_commands_of_its_head_are_understood(script):
    text = "\n".join(script.head).replace("\\\n", " ")
    commands = re.findall(r"python (\S+\.py)(.*)", text)
    assert commands
    for file, rest in commands:
        words = shlex.split(re.split(r"\s{3,}(?=[a-zA-Z])", rest.replace("[only", " [only"))[0])
        understood(words, SCRIPTS[Path(file).stem])


NEEDED = {
    "evaluate": "images=…", "measure": "images=…", "report": "folder=…", "compare": "folders=…",
    "publish": "set=… and repo=…", "remake_image": "set=… and image=…",
    "show_modes": "sets=… and image_size=… and out=…", "fetch_data": "name=…",
    "fetch_weights": "one of backbone=…, source=…",
    "reproduce": "one of table=…, figure=…, grid=…",
    "make_tables": "one of table=…, figure=…, grid=…",
}  # fmt: skip


def test_a_script_without_its_keys_says_what_is_missing_without_torch():
    scripts = [SCRIPTS[name] for name in NEEDED]
    for script, (code, text) in zip(scripts, said(*[(s.file,) for s in scripts]), strict=True):
        assert code == 1
        assert text.startswith(
            f"error: {script.file} needs {NEEDED[script.name]}, for example «python {script.file} "
        )
        assert text.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("run", ["images=x"], r"run\.py reads no key images\. scripts/evaluate\.py and .*measure"),
        ("run", ["+images=x"], r"run\.py reads no key images"),
        ("run", ["folder=runs"], r"run\.py reads no key folder\. scripts/report\.py reads it"),
        ("run", ["table=1"], r"scripts/reproduce\.py and scripts/make_tables\.py read it"),
        ("run", ["methd=mgd3"], r"reads no key methd\. Did you mean method\?.*Allowed here: back"),
        ("run", ["imagenette"], r"'imagenette' is not KEY=VALUE; write dataset=imagenette"),
        ("evaluate", ["images=x", "ipc=10"], r"reads no key ipc\. run\.py"),
        ("evaluate", ["images=/my", "photos"], r"""two kinds of quotes: 'images="/my photos"'"""),
        ("report", ["runs/demo", "folders=x"], r"Did you mean folder\?.*compare\.py reads it"),
        ("make_tables", ["table=1", "plan=true"], r"no key plan\. .*reproduce\.py read it"),
        ("reproduce", ["table1"], "write table=1"),
        ("report", ["a", "b"], "'a' is not KEY=VALUE"),
        ("run", ["students=[a,", "b"], r"students=\[a, b: a bracket is not closed"),
        ("run", ["-m", "method=a,", "seed=1"], "method=a, ends with a comma: write method=A,B"),
        ("run", ["seed="], "has no value"),
    ],
)
def test_what_a_script_does_not_read_is_refused(script, words, message):
    with pytest.raises(UserError, match=message):
        understood(words, SCRIPTS[script])


@pytest.mark.parametrize(
    ("script", "words", "taken"),
    [
        ("run", ["-m", "method=a,", "b", "seed=1"], ["-m", "method=a, b", "seed=1"]),
        ("run", ["dataset.classes=[0,", "1]", "ipc=1"], ["dataset.classes=[0, 1]", "ipc=1"]),
        ("run", ["ipc", "=", "3"], ["ipc=3"]),
        ("run", ["dataset.root=~/x", "data=~"], ["dataset.root=/me/x", "data=/me"]),
        ("run", ["~tracker", "runs=a~b"], ["~tracker", "runs=a~b"]),
        ("compare", ["folders=[~/a,~/b]"], ["folders=[/me/a,/me/b]"]),
        ("compare", ["runs/a", "runs/b"], ["folders=[runs/a,runs/b]"]),
        ("fetch_weights", ["dit_xl2_256"], ["backbone=dit_xl2_256"]),
        ("fetch_weights", ["org/name"], ["source=org/name"]),
        ("evaluate", ["/my photos", "ipc=1"][:1], ['images="/my photos"']),
        ("run", ["--config-dir", "mine", "ipc=1"], ["--config-dir", "mine", "ipc=1"]),
        ("evaluate", ["--cfg", "job"], ["--cfg", "job"]),
        ("reproduce", ["table=1", "dataset.root=x"], ["table=1", "++dataset.root=x"]),
        # in a sweep, one value of a group's key as a sweep over it alone, so that runs without such
        # a key compose
        ("run", ["-m", "guidance.scale=1"], ["-m", "guidance.scale=choice(1)"]),
        (
            "run",
            ["experiment=parity", "data=x", "dataset.classes=[0,1]"],
            ["experiment=parity", "data=x", "dataset.classes=choice([0,1])"],
        ),
        (
            "run",
            ["-m", "guidance.scale=1,2", "sampler.steps=range(1,3)", "hydra.verbose=true"],
            ["-m", "guidance.scale=1,2", "sampler.steps=range(1,3)", "hydra.verbose=true"],
        ),
        (
            "run",
            ["experiment=parity", "guidance.scale=1", "--cfg", "job"],
            ["--cfg", "job", "experiment=parity", "guidance.scale=1"],
        ),
    ],
)
def test_what_a_shell_has_cut_or_left_alone_is_put_right(monkeypatch, script, words, taken):
    monkeypatch.setenv("HOME", "/me")
    assert understood(words, SCRIPTS[script]) == taken


CHOICES = {
    "method": "mgd3", "dataset": "imagenette", "protocol": "hard_label", "modes": "kmeans",
    "sampler": "ddim_released", "tracker": "wandb",
}  # fmt: skip


@pytest.mark.parametrize(("group", "name"), CHOICES.items())
def test_a_misspelt_choice_is_answered_with_the_closest(tmp_path, group, name):
    done = run(tmp_path, f"{group}={name[:-1]}")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {group}={name[:-1]} is unknown. Did you mean {name}?")
    assert list(tmp_path.iterdir()) == []


def test_what_hydra_says_of_errors_is_not_repeated(tmp_path):
    one = run(tmp_path, "seed=-1", HYDRA_FULL_ERROR="0")
    assert one.stderr == "error: seed=-1 is out of range; allowed: >= 0\n"
    assert list(tmp_path.iterdir()) == []
    several = run(tmp_path, "-m", "seed=-1,-2", "method=random")
    assert several.stderr == one.stderr
    assert several.stdout.count("failed: seed=-") == 2
    assert [p.name for p in tmp_path.rglob("*")] == ["runs", "multirun.yaml"]


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_step.py").write_text("def broken(state):\n    raise ZeroDivisionError\n")
    done = run(
        tmp_path, "backbone=toy", "tracker=none", "on_step=my_step.broken", "ipc=1",
        "sampler.steps=2", "guidance.stop_t=1",
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and "ZeroDivisionError" in done.stderr
    assert "Error executing job" not in done.stderr


def test_a_missing_gpu_is_explained(tmp_path):
    done = run(tmp_path, "compute.device=cuda", CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 1
    assert re.match(
        r"error: compute\.device=cuda is not available here: (CUDA_VISIBLE_DEVICES='-1' hides every"
        r" GPU; unset it|this build of PyTorch \(.*\) is for CPUs alone; install).* Allowed: auto",
        done.stderr,
    )
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_that_is_there_is_not_missed():
    """Asked where it can be seen: in a process of its own."""
    code = (
        "import torch; from mgd3.runtime.hardware import why_no_gpu as why\n"
        "assert not (torch.cuda.is_available() and why()), why()\n"
        "assert torch.backends.cuda.is_built() or 'for CPUs alone' in why(), why()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=seeing_gpus(), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_shell_completes_words_without_torch():
    line = "python run.py method=self"
    ((code, text),) = said(
        ("run.py", "-sc", "query=bash"), COMP_LINE=line, COMP_POINT=str(len(line))
    )
    assert (code, text) == (0, "method=self_adaptive_memory\n")
    line = "python run.py fl"
    ((code, text),) = said(("run.py", "-sc", "query=bash"), COMP_LINE=line, COMP_POINT="16")
    assert (code, text) == (0, "flip=\n")
    line = "python scripts/measure.py metrics=vae"
    ((code, text),) = said(
        ("scripts/measure.py", "-sc", "query=bash"), COMP_LINE=line, COMP_POINT=str(len(line))
    )
    assert (code, text) == (0, "metrics=vae_latents\n")


@pytest.mark.parametrize("said_before", [None, "active"])
def test_threads_soon_sleep_while_they_wait_unless_told_otherwise(said_before):
    """Before torch is loaded, which is when OpenMP reads it."""
    code = (
        "import os, sys; sys.argv = ['run.py', 'ipc=1']; from mgd3.config.command import start; "
        "start(); assert 'torch' not in sys.modules; "
        "print(*(os.environ.get(k) for k in ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))"
    )
    taken = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    environment = {k: v for k, v in os.environ.items() if k not in taken}
    if said_before:
        environment["OMP_WAIT_POLICY"] = said_before
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    expected = f"{said_before} None" if said_before else "None 1000"
    assert done.stdout.strip() == expected, done.stderr

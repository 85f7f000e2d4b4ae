"""The examples of docs/extending.md and docs/adding_a_guidance.md, run as the pages say.

And modules that lack something.
"""

import json
import re
import shutil
import sys

import pytest
from conftest import QUICK, ROOT, run

PAGES = [(ROOT / f"docs/{name}.md").read_text() for name in ("extending", "adding_a_guidance")]
PAGE = "\n".join(PAGES)
OWN = re.compile(r"`(my_[\w/.]+)`\n\n```(?:python|yaml)\n(.*?)```", re.S)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with the page's files, on the path as PYTHONPATH=. would put it."""
    files = OWN.findall(PAGE)
    assert len(files) == 17
    for name, text in files:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("my_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "overrides",
    [
        ("modes=farthest", "guidance=late", "guidance.start_t=2", "sampler.steps=4"),
        ("pool=2", "select=contrast", "sampler.steps=4", "guidance.stop_t=2"),
        ("method=mean_image",),
        ("dataset=blobs", "students=[my_students.tiny]", "method=random"),
        ("dataset=blobs", "students=[my_students.tiny]", "modes=farthest", "sampler.steps=4",
         "guidance.stop_t=2"),
    ],
    ids=["modes and guidance", "selection", "method", "dataset and student", "all but the method"],
)  # fmt: skip
def test_the_pages_files_run(here, overrides):
    assert "PYTHONPATH=. python run.py --config-dir my_configs" in PAGE
    quick = [o for o in QUICK if "students" not in o or "students" not in str(overrides)]
    done = run(here, "--config-dir", "my_configs", *quick, *overrides, "ipc=3")
    assert done.returncode == 0, done.stderr[-1500:]
    (manifest,) = here.glob("runs/*/*/ipc3/*/manifest.json")
    chosen = json.loads(manifest.read_text())["identity"]
    groups = ("modes", "method", "dataset", "select")
    named = {o.split("=")[1] for o in overrides if o.split("=")[0] in groups}
    assert named <= {part["choice"] for part in chosen.values() if isinstance(part, dict)}
    assert len(list((manifest.parent / "images").rglob("*.png"))) == (
        6 if "dataset=blobs" in overrides else 30
    )


GUIDED = {
    "late": ("guidance.scale=0", "guidance.start_t=2"),
    "spread": ("guidance.size=0", "guidance.stop_t=1"),
    "apart": ("guidance.size=0",),
    "late_apart": ("guidance.late.scale=0", "guidance.late.start_t=2", "guidance.apart.size=0"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Samples without guidance."""
    cwd = tmp_path_factory.mktemp("plain")
    (cwd / "my_configs").mkdir()
    return guided(cwd, "guidance=none")


def guided(cwd, *overrides):
    """A run's images by their names."""
    few = ("dataset.classes=[0,1]", "students=[]", "sampler.steps=4", "ipc=3")
    quick = [o for o in QUICK if "students" not in o]
    done = run(cwd, "--config-dir", "my_configs", *quick, *few, *overrides)
    assert done.returncode == 0, done.stderr[-1500:]
    (manifest,) = cwd.glob("runs/*/*/ipc3/*/manifest.json")
    folder = manifest.parent / "images"
    found = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")}
    shutil.rmtree(cwd / "runs")
    return found


@pytest.mark.parametrize("name", GUIDED)
def test_the_pages_guidances_move_images_and_keep_the_contract(here, plain, name):
    """Size 0 changes no byte, another batch size changes none either, and the first of each class
    sees no image that is finished."""
    off = GUIDED[name]
    keys = [o for o in off if not o.endswith("=0")]
    on = guided(here, f"guidance={name}", *keys)
    assert guided(here, f"guidance={name}", *off) == plain
    moved = {file for file, data in on.items() if data != plain[file]}
    first = {"0/00000.png", "1/00000.png"}
    assert moved == set(plain) - (first if name == "apart" else set())
    if "apart" in name:
        assert guided(here, f"guidance={name}", *keys, "compute.batch_size=1") == on


def test_a_table_of_ones_own_is_planned(here):
    (here / "my_configs/paper/mine.yaml").write_text(
        (here / "my_configs/paper/mine.yaml").read_text().replace("[0, 1, 2]", "[0]")
    )
    done = run(
        here, "--config-dir", "my_configs", "grid=mine", "plan=true", "tracker=none",
        "only.ipc=1", "backbone=toy", script="scripts/reproduce.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    assert re.search(r"all +0 +3 ", done.stdout), done.stdout


BROKEN = {
    "no module": ("_target_: my_nothing.Modes", r"modes: my_nothing.Modes cannot be imported"),
    "an error inside": (
        "_target_: my_broken.Modes",
        r"modes: .*cannot be imported \(no such thing",
    ),
    "no such class": ("_target_: my_modes.Modus", r"modes: my_modes.Modus cannot be imported"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_module_that_does_not_import_is_one_message(here, kind):
    text, message = BROKEN[kind]
    (here / "my_broken.py").write_text("raise ValueError('no such thing')")
    (here / "my_configs/modes/bad.yaml").write_text(f"{text}\nreads: [train]\n")
    refused = run(here, "--config-dir", "my_configs", *QUICK, "modes=bad")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert re.search(message, refused.stderr), refused.stderr
    assert not (here / "runs").exists()


def test_a_class_without_what_its_place_asks_for_is_named(here):
    (here / "my_half.py").write_text("class Half:\n    needs_modes = True\n")
    (here / "my_configs/guidance/half.yaml").write_text("_target_: my_half.Half\n")
    refused = run(here, "--config-dir", "my_configs", *QUICK, "guidance=half")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "guidance: my_half.Half lacks check, bind; docs/extending.md" in refused.stderr


def test_a_selection_that_takes_one_twice_is_refused(here):
    path = here / "my_select.py"
    path.write_text(path.read_text().replace("return [int", "return [1] * ipc or [int"))
    few = ("pool=2", "select=contrast", "sampler.steps=2", "ipc=2", "guidance=none")
    refused = run(here, "--config-dir", "my_configs", *QUICK, *few)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "select: my_select.Contrast chose [1, 1] of 4 candidates" in refused.stderr
    assert "must return 2 different numbers from 0 to 3" in refused.stderr


def test_a_method_must_say_what_it_reads(here):
    path = here / "my_configs/method/mean_image.yaml"
    path.write_text(path.read_text().replace("reads: [train, ipc]\n", ""))
    refused = run(here, "--config-dir", "my_configs", *QUICK, "method=mean_image")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "method.reads is missing: mean_image must list" in refused.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_students.none", "my_students.none cannot be imported"),
        ("my_nothing.tiny", "my_nothing.tiny cannot be imported"),
    ],
)
def test_a_student_that_is_not_there_is_one_message(here, name, message):
    refused = run(here, *QUICK, f"students=[{name}]")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert message in refused.stderr


def test_a_callback_of_ones_own_sees_every_step(here):
    page = (ROOT / "docs/debugging.md").read_text()
    ((name, text),) = OWN.findall(page)
    (here / name).write_text(text)
    assert "on_step=my_watch.norms" in page
    done = run(
        here, *QUICK, "on_step=my_watch.norms", "ipc=1", "sampler.steps=4", "guidance.stop_t=1"
    )
    assert done.returncode == 0, done.stderr[-1500:]
    steps = re.findall(r"^(\d) \('0', 0\) [\d.]+$", done.stdout, re.M)
    assert steps == ["3", "2", "1", "0"]
    wrong = run(here, *QUICK, "on_step=my_watch.nothing", "ipc=2")
    assert wrong.returncode == 1 and "on_step=my_watch.nothing cannot be imported" in wrong.stderr

"""Bad inputs of every kind: each ends in one line that says what to mend, and changes nothing."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from conftest import QUICK, ROOT, image
from safetensors.torch import load_file, save_file

from campaign.processes import Finished, Outcome, at_once, child
from campaign.stages import BACKBONE, FEW_STEPS, FOLDER, SOFT, STUDENT, TEACHER, TWO_CLASSES

WHAT, RIGHT = "bad inputs", "were refused well"

RUN = (*QUICK, *TWO_CLASSES, *FEW_STEPS)
EVALUATE = (
    "dataset.classes=[0,1]", STUDENT, "protocol.epochs_by_ipc=[[null,2]]", "compute.device=cpu",
)  # fmt: skip
SHIPPED = ROOT / "mgd3/backbones/weights/dit_digits.safetensors"
CANARY = "canary"
POPEN = {"_target_": "subprocess.Popen", "args": f"touch {CANARY}", "shell": True}
_OURS = (".log", ".lock", ".yaml")  # what a refused run may add to: its own log and record


@dataclass(frozen=True)
class Case:
    """A command, how its folder is spoilt before it, and what it must say."""

    name: str
    overrides: tuple[str, ...]
    said: str  # a pattern of the one line
    spoil: Callable[[Path], None] = lambda here: None
    base: str = ""  # what the folder holds before: "run", "soft", "tree"
    script: str = "run.py"
    options: dict = field(default_factory=dict)  # of `child`
    environment: dict = field(default_factory=dict)
    accepted: bool = False  # is it to end well, whatever it says?


def outcomes(work: Path, quick: bool, workers: int) -> Iterator[Outcome]:
    """Every case in a folder of its own; `quick` takes one of each kind."""
    work.mkdir(parents=True, exist_ok=True)
    chosen = CASES[::_QUICK_STEP] if quick else CASES
    named = sorted({case.base for case in chosen} - {""})
    bases = {name: _made(work / f"base-{name}", name) for name in named}
    return at_once([partial(_tried, work, bases, case) for case in chosen], workers)


_QUICK_STEP = 15


def _made(folder: Path, name: str) -> Path:
    """A folder as a finished run, or a user, leaves it."""
    folder.mkdir()
    if name == "tree":
        for split, count in (("train", 4), ("val", 2)):
            for label, wnid in enumerate(("cat", "dog")):
                (folder / split / wnid).mkdir(parents=True)
                for i in range(count):
                    image(100 * label + i).save(folder / split / wnid / f"{i}.png")
        return folder
    done = child(folder, *(RUN if name == "run" else SOFT))
    if done.returncode != 0:
        raise RuntimeError(f"the run to be spoilt failed: {done.stderr[-2000:]}")
    return folder


def _tried(work: Path, bases: dict[str, Path], case: Case) -> Outcome:
    # whoever a command runs as must reach its folder
    place = None if case.options.get("as_nobody") else work
    here = Path(tempfile.mkdtemp(prefix=re.sub(r"\W+", "-", case.name)[:40] + "-", dir=place))
    if case.base:
        shutil.copytree(bases[case.base], here, dirs_exist_ok=True)
    case.spoil(here)
    before = _files(here)
    if case.options.get("as_nobody"):
        _give_away(here)
    done = child(here, *case.overrides, script=case.script, timeout=60, **case.options,
                 **case.environment)  # fmt: skip
    said = _wrong(case, here, before, done)
    if not said:
        shutil.rmtree(here, ignore_errors=True)
    return Outcome(case.name, not said, said)


def _wrong(case: Case, here: Path, before: dict[str, bytes], done: Finished) -> str:
    """What is not as it should be; "" if all is."""
    everything = done.stdout + done.stderr
    line = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    if done.returncode is None:
        return "hangs"
    if "Traceback" in everything or "Logging error" in everything:
        return f"traceback: {done.last_words}"
    if list(here.rglob(CANARY)):
        return "foreign code has run"
    if case.accepted:
        return "" if done.returncode == 0 else f"refused: {done.last_words}"
    if done.returncode != 1:
        return f"exit code {done.returncode}: {done.last_words}"
    if not line.startswith("error: ") or not re.search(case.said, line):
        return f"says otherwise than «{case.said}»: {line}"
    after = _files(here)
    lost = [n for n, data in before.items() if after.get(n) != data and not n.endswith(_OURS)]
    return f"changed {', '.join(lost[:3])}" if lost else ""


def _files(here: Path) -> dict[str, bytes]:
    """What a refused command has to leave alone."""
    return {
        str(path.relative_to(here)): path.read_bytes()
        for path in here.rglob("*")
        if path.is_file() and "cache/inventory" not in str(path)
    }


def _give_away(here: Path) -> None:
    """The folder and all in it to the user that the command runs as."""
    for path in (here, *here.rglob("*")):
        if not os.path.islink(path) and path.stat().st_mode & 0o200:
            os.chown(path, 65534, 65534)


# How things are spoilt.


def _one(here: Path, pattern: str) -> Path:
    return next(iter(sorted(here.rglob(pattern))))


def _text(pattern: str, text: str | bytes) -> Callable[[Path], None]:
    """The file has this content."""

    def spoil(here: Path) -> None:
        data = text.encode() if isinstance(text, str) else text
        _one(here, pattern).write_bytes(data)

    return spoil


def _json(pattern: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The file's JSON is changed, or replaced by what `change` returns."""

    def spoil(here: Path) -> None:
        path = _one(here, pattern)
        value = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl"
                           else path.read_text())  # fmt: skip
        changed = change(value)
        path.write_text(json.dumps(value if changed is None else changed) + "\n")

    return spoil


def _row(**values: object) -> Callable[[Path], None]:
    return _json("results.jsonl", lambda row: row.update(values))


def _entry(**values: object) -> Callable[[Path], None]:
    return _json("manifest.json", lambda m: m["images"][0].update(values))


def _folder(pattern: str) -> Callable[[Path], None]:
    """A folder stands where the file was."""

    def spoil(here: Path) -> None:
        path = _one(here, pattern)
        path.unlink()
        path.mkdir()

    return spoil


def _replace_image(here: Path) -> None:
    image(9, (8, 8)).save(_one(here, "images/*/*.png"))


def _link_image_out(here: Path) -> None:
    path = _one(here, "images/*/*.png")
    shutil.copy(path, here / "elsewhere.png")
    path.unlink()
    path.symlink_to(here / "elsewhere.png")


def _link_scores(here: Path) -> None:
    scores = _one(here, "hard_label*")
    scores.rename(here / "elsewhere")
    scores.symlink_to(here / "elsewhere")


def _link_rows(here: Path) -> None:
    rows = _one(here, "results.jsonl")
    rows.rename(here / "rows")
    rows.symlink_to(here / "rows")


def _to_fifo(pattern: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        path = _one(here, pattern)
        path.unlink()
        os.mkfifo(path)

    return spoil


def _previews(shape: tuple[int, ...], kind: torch.dtype) -> Callable[[Path], None]:
    """Pictures of modes of another shape or kind."""

    def spoil(here: Path) -> None:
        from mgd3.storage.tensors import save_tensors

        tensors = {f"0.{n}": torch.zeros(shape, dtype=kind) for n in ("centroids", "nearest")}
        save_tensors(_one(here, "previews.safetensors"), tensors, {})

    return spoil


def _users_folder(here: Path) -> None:
    (here / "mine").mkdir()
    for name in ("README.md", "report.html", "notes.log"):
        (here / "mine" / name).write_text("mine\n")
    image().save(here / "mine/photo.png")


def _only_logs(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine/run.log").write_text("mine\n")


def _linked_run(here: Path) -> None:
    (here / "there").mkdir()
    (here / "link").symlink_to(here / "there")


def _fifo(place: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        path = here / place
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)

    return spoil


def _bomb(here: Path) -> None:
    """A PNG of 400 megapixels in a few kilobytes."""
    from PIL import Image

    Image.new("1", (40000, 10000)).save(here / "train/cat/1.png")


def _weights(change: Callable[[dict, dict], None]) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        from safetensors import safe_open

        with safe_open(SHIPPED, framework="pt") as file:
            metadata = dict(file.metadata())
        tensors = load_file(SHIPPED)
        change(tensors, metadata)
        save_file(tensors, here / "w.safetensors", metadata)

    return spoil


def _to_int8(tensors: dict, metadata: dict) -> None:
    for name in tensors:
        tensors[name] = tensors[name].to(torch.int8)


def _no_tokens(tensors: dict, metadata: dict) -> None:
    tensors["pos_embed"] = tensors["pos_embed"][:, :0].clone()


def _program(name: str, more: bytes = b"") -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        torch.jit.script(torch.nn.Linear(1, 1)).save(str(here / name))
        (here / name).write_bytes((here / name).read_bytes() + more)

    return spoil


def _pickle(name: str) -> Callable[[Path], None]:
    return lambda here: (here / name).write_bytes(f"cos\nsystem\n(S'touch {CANARY}'\ntR.".encode())


def _read_only_target(here: Path) -> None:
    (here / "closed").mkdir(mode=0o555)


def _shared(here: Path) -> None:
    """The cache belongs to somebody else; the runs are still to be made."""
    shutil.rmtree(here / "runs")
    (here / "cache").rename(here / "shared")
    _close(here / "shared")


def _shared_teacher(here: Path) -> None:
    teacher = _one(here, "cache/students/*.safetensors")
    (here / "shared").mkdir()
    shutil.copy(teacher, here / "shared/teacher.safetensors")
    for path in ("runs", "cache"):
        shutil.rmtree(here / path)
    _close(here / "shared")


def _close(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)


def _own_images(*files: str) -> Callable[[Path], None]:
    """A folder made elsewhere, with a class of each digit and these files besides."""

    def spoil(here: Path) -> None:
        for name in ("0", "1"):
            (here / "own" / name).mkdir(parents=True)
            image(int(name), (8, 8)).save(here / "own" / name / "a.png")
        for file in files:
            (here / "own" / file).write_bytes(b"no image")

    return spoil


def _own_link(here: Path) -> None:
    _own_images()(here)
    image().save(here / "private.png")
    (here / "own/0/b.png").symlink_to(here / "private.png")


def _checkpoint(content: dict) -> Callable[[Path], None]:
    """A student's checkpoint of another structure, whole by its own checksum."""

    def spoil(here: Path) -> None:
        from mgd3.storage.tensors import save_tensors

        results = _one(here, "results.jsonl")
        results.unlink()
        save_tensors(results.parent / ".convnet2_w8-0.checkpoint", content, {})

    return spoil


def _without(*patterns: str) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for pattern in patterns:
            for path in here.rglob(pattern):
                path.unlink()

    return spoil


def _then(*steps: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(here: Path) -> None:
        for step in steps:
            step(here)

    return spoil


def _run(name: str, *overrides: str, said: str, **more: object) -> Case:
    return Case(name, (*RUN, *overrides), said, **more)


def _finished(name: str, spoil: Callable[[Path], None], said: str, *more: str, **other) -> Case:
    """A finished run is spoilt, and its command given again."""
    return Case(name, (*RUN, *more), said, spoil=spoil, base="run", **other)


def _scored(name: str, spoil: Callable[[Path], None], said: str, **other) -> Case:
    """A finished set is spoilt, then scored."""
    overrides = ("images=runs", *EVALUATE, "tracker=none")
    return Case(name, overrides, said, spoil=spoil, base="run", script="scripts/evaluate.py",
                **other)  # fmt: skip


def _reported(name: str, spoil: Callable[[Path], None], said: str, **other) -> Case:
    return Case(name, ("folder=runs",), said, spoil=spoil, base="run", script="scripts/report.py",
                **other)  # fmt: skip


def _weight_file(name: str, spoil: Callable[[Path], None], said: str, *more: str) -> Case:
    overrides = (*QUICK[1:], *TWO_CLASSES, *FEW_STEPS, "backbone=dit_digits",
                 "backbone.weights=w.safetensors", *more)  # fmt: skip
    return Case(name, overrides, said, spoil=spoil)


_WHOLE = "whole distilled dataset"
FOREIGN_CODE = [
    _reported(
        "a manifest's dataset is a class",
        _json("manifest.json", lambda m: m["identity"].update(dataset=POPEN)), "", accepted=True,
    ),
    _reported(
        "a manifest's dataset has a class among its values",
        _json("manifest.json", lambda m: m["identity"]["dataset"].update(values=POPEN)), "",
        accepted=True,
    ),
    _scored(
        "a scored manifest's dataset is a class",
        _json("manifest.json", lambda m: m["identity"].update(dataset=POPEN)), "", accepted=True,
    ),
    *[
        Case(
            f"an image is made again from a manifest with {what}",
            ("image=images/0/00000.png", "set=set", "out=x.png"), said,
            spoil=_then(
                _json("manifest.json", lambda m, c=change: m["identity"].update(c)),
                lambda here: shutil.copytree(_one(here, "manifest.json").parent, here / "set"),
            ),
            base="run", script="scripts/remake_image.py",
        )
        for what, change, said in (
            ("a class", {"modes": {"choice": "kmeans", "values": POPEN}}, "may not set modes._tar"),
            ("a path for a choice", {"modes": {"choice": "../../x", "values": {}}}, "modes of an"),
            ("weights of this machine", {"backbone": {"choice": "toy", "values": {
                "weights": "/etc/hostname"}}}, "may not set backbone.weights"),
            ("values that are a list", {"modes": {"choice": "kmeans", "values": []}}, "by name"),
            ("a resolver", {"seed": "${oc.env:HOME}"}, "an identity may not set seed"),
            ("a key of Hydra", {"hydra": {"choice": "x"}}, "a group of an identity='hydra'"),
            ("a student's module", {"features": {"choice": "student", "values": {
                "student": "os.system"}}}, "may not set features.student"),
        )
    ],
    *[
        Case(
            f"weights that are a program{what}",
            (*QUICK[1:], *TWO_CLASSES, *FEW_STEPS, "backbone=dit_digits", f"backbone.weights={n}"),
            "not a readable weight file", spoil=_program(n, more),
        )
        for n, what, more in (
            ("w.pt", "", b""), ("w.pt", " and an end of another zip", b"PK\x05\x06"),
            ("w.ckpt", " and more", b"PK\x05\x06" + bytes(18)),
            ("w.safetensors", " by suffix", b""),
        )
    ],
    *[
        Case(
            f"weights that are a pickle that calls, as {n}",
            (*QUICK[1:], *TWO_CLASSES, *FEW_STEPS, "backbone=dit_digits", f"backbone.weights={n}"),
            "not a readable weight file", spoil=_pickle(n),
        )
        for n in ("w.pt", "w.ckpt", "w.safetensors")
    ],
    Case(
        "plain http without a checksum", ("source=http://127.0.0.1:9/w.pt",), "insecure=true",
        script="scripts/fetch_weights.py",
    ),
]  # fmt: skip

NOTHING_LOST = [
    _run("hydra.run.dir without a value", "hydra.run.dir=", said="hydra.run.dir= has no value"),
    _run("runs without a value", "runs=", said="runs= has no value"),
    _run("an empty folder by an interpolation", "runs=${oc.env:NOTHING_SUCH,''}",
         said="runs has no value"),
    _run("hydra.run.dir is here", "hydra.run.dir=.", said="is no folder for a run"),
    _run("hydra.run.dir is the root", "hydra.run.dir=/", said="is no folder for a run"),
    _run("a user's folder as run dir", "hydra.run.dir=mine", spoil=_users_folder,
         said="not empty and no run of this project .*README.md, .*nothing is written there"),
    _run("a user's folder of logs as run dir", "hydra.run.dir=mine", spoil=_only_logs,
         said="not empty and no run of this project .*run.log"),
    Case("a user's folder as a sweep's", ("-m", *RUN, "hydra.sweep.dir=.",
         "hydra.sweep.subdir=mine", "seed=0,1"), "not empty and no run of this project",
         spoil=_users_folder),
    Case("a user's folder as an evaluation's", ("images=own", *EVALUATE, "hydra.run.dir=mine"),
         "not empty and no run of this project", script="scripts/evaluate.py",
         spoil=_then(_users_folder, _own_images())),
    _reported("a user's own report.html beside runs", lambda here: (
        here / "runs/report.html").write_text("mine"), "that is not this script's"),
    _reported("a user's own summary.json beside runs", lambda here: (
        here / "runs/summary.json").write_text("[1]"), "summary.json: its content is"),
    Case("an evaluated dataset's name leads out", ("images=own", "dataset=folder",
         "dataset.root=.", "dataset.name=../x", "dataset.student_size=8", STUDENT),
         "dataset.name='../x' is no name", base="tree", script="scripts/evaluate.py"),
    Case("a user's folder as a training's", (*BACKBONE, "hydra.run.dir=mine"),
         "not empty and no run of this project", script="scripts/train_backbone.py",
         spoil=_users_folder),
    _finished("another run's folder as run dir", lambda here: _one(here, "hard_label*").rename(
        here / "other"), "left as it is|already holds a run with other values", "seed=5",
        "hydra.run.dir=other"),
    _run("dataset.name leads out", "dataset.name=../..", said="dataset.name='../..' is no name"),
    _run("method.name leads out", "method.name=../x", said="method.name='../x' is no name"),
    _run("protocol.name leads out", "protocol.name=a/b", said="protocol.name='a/b' is no name"),
    _run("a long name", f"dataset.name={'x' * 300}", said="dataset.name=.* is no name"),
    Case("a title leads out", ("images=own", *EVALUATE, "title=../../../x"),
         r"title='../../../x' is no name", script="scripts/evaluate.py", spoil=_own_images()),
    Case("a title of several lines", ("images=own", *EVALUATE, 'title="a\nb"'),
         r"title='a\\nb' is no name", script="scripts/evaluate.py", spoil=_own_images()),
    Case("the file of another training as backbone.weights", BACKBONE,
         "comes from elsewhere .*not overwritten", script="scripts/train_backbone.py",
         spoil=lambda here: ((here / "own").mkdir(),
                             shutil.copy(SHIPPED, here / "own/weights.safetensors"))),
    _scored("a manifest's file leads out", _entry(file="../../../../../../../x.png"),
            "names an image outside its folder"),
    _scored("a manifest's file is a whole path", _entry(file="/etc/hostname"),
            "names an image outside its folder"),
    _scored("a set's image is a link out", _link_image_out, "is a link, and links below"),
    _reported("a reported set's image is a link out", _link_image_out, "", accepted=True),
    _scored("a set's score folder is a link out", _link_scores, "is a link, and links below"),
    _finished("a run's rows are a link out", _link_rows, "is a link, and links below"),
    _reported("a manifest names a folder of this machine", _json("manifest.json", lambda m: m[
        "identity"].update(dataset={"choice": "folder", "values": {"root": "/etc"}})), "",
        accepted=True),
    Case("a finished run's folder as a measurement's", ("images=runs", "dataset.classes=[0,1]",
         "metrics=pixels", "hydra.run.dir=there"), "not empty and no run of this project",
         base="run", script="scripts/measure.py", spoil=lambda here: shutil.copytree(
             _one(here, "hard_label*"), here / "there")),
    Case("a user's multirun.yaml", ("-m", *RUN, "hydra.sweep.dir=mine", "seed=0,1"),
         "multirun.yaml is not Hydra's", spoil=_then(_users_folder, lambda here: (
             here / "mine/multirun.yaml").write_text("mine"))),
    Case("an image is made again over the set's own", ("set=set", "image=images/0/00000.png",
         "out=set/images/0/00000.png"), "lies in the set", base="run",
         script="scripts/remake_image.py",
         spoil=lambda here: shutil.copytree(_one(here, "manifest.json").parent, here / "set")),
    Case("an own folder's image is a link out", ("images=own", *EVALUATE),
         "is a link, and links below own", script="scripts/evaluate.py", spoil=_own_link),
    _finished("a row of another run", _row(run_id="00000000", top1_last=99.9, top1_best=99.9),
              "is of run 00000000, but this folder is run"),
    _reported("a reported row of another run", _row(run_id="00000000", top1_last=99.9),
              "is of run 00000000, but this folder is run"),
    *[
        _finished(f"a row with {what}", _row(**values), f"results.jsonl, line 1: {said}")
        for what, values, said in (
            ("a score that is text", {"top1_last": "99"}, "top1_last is '99'"),
            ("no score", {"top1_last": None}, "top1_last is None"),
            ("a score that is no number", {"top1_best": float("nan")}, "top1_best is nan"),
            ("a score above 100", {"top1_best": 101.0}, "top1_best is 101.0"),
            ("a negative seed", {"student_seed": -1}, "student_seed is -1"),
            ("another method's path", {"method": "../x"}, "method is '../x'"),
        )
    ],
    _finished("a row that is a list", _text("results.jsonl", "[]\n"), r"line 1: its content is"),
    _finished("a row that is no JSON", _text("results.jsonl", "{x\n"), "line 1 is no JSON"),
    _reported("a reported row that is no JSON", _text("results.jsonl", "{x\n"), "is no JSON"),
    _finished("an image of a finished set was replaced", _replace_image,
              "1 images of .* are missing or differ from the manifest's checksums"),
    _scored("a scored set's image was replaced", _replace_image, "manifest's checksums"),
]  # fmt: skip

STRUCTURES = [
    *[
        _scored(f"a scored manifest {what}", spoil, f"manifest.json:? .*{said}.*{_WHOLE}")
        for what, spoil, said in (
            ("that is a list", _text("manifest.json", "[]"), "its content is"),
            ("that is empty", _text("manifest.json", "{}"), "is missing"),
            ("that is no JSON", _text("manifest.json", "{"), "is no JSON"),
            ("that is bytes", _text("manifest.json", b"\xff\xfe\0"), "is no JSON"),
            ("without classes", _json("manifest.json", lambda m: m.pop("classes") and None),
             "classes is missing"),
            ("without digests", _json(
                "manifest.json", lambda m: m["images"][0].pop("sha256") and None),
             "images.0.sha256 is missing"),
            ("with an IPC that is text", _json("manifest.json", lambda m: m.update(ipc="2")),
             "ipc is '2'"),
            ("with images that are text", _json("manifest.json", lambda m: m.update(images="x")),
             "images is 'x'"),
            ("with a class that leads out", _json("manifest.json", lambda m: m["classes"][0].update(
                wnid="../x")), "classes.0.wnid is"),
        )
    ],
    _scored("a scored manifest that is a folder", _folder("manifest.json"), ""),
    *[
        _finished(f"{file} {what}", spoil(file), said)
        for file in ("identity.json", "protocol.json")
        for what, spoil, said in (
            ("that is a list", lambda f: _text(f, "[]"), "its content is"),
            ("that is empty", lambda f: _text(f, "{}"), "earlier version"),
            ("that is no JSON", lambda f: _text(f, "x"), "is no JSON"),
            ("with data of another kind", lambda f: _json(f, lambda c: c.update(data=5)),
             "data is 5"),
            ("with files of another kind", lambda f: _json(f, lambda c: c.update(files=[1])),
             "files is"),
            ("that is a folder", _folder, "Is a directory|cannot be read"),
        )
    ],
    *[
        _finished(f"{file} that is a FIFO", _to_fifo(file), "it is no file")
        for file in ("identity.json", "protocol.json", "manifest.json")
    ],
    _scored("a set's image that is a FIFO", _to_fifo("images/*/*.png"), "are missing or differ"),
    *[
        _reported(f"previews {what}", spoil, "", accepted=True)
        for what, spoil in (
            ("that are a FIFO", _to_fifo("previews.safetensors")),
            ("that are numbers", _previews((), torch.uint8)),
            ("of five channels", _previews((2, 5, 8, 8), torch.uint8)),
            ("of fractions", _previews((2, 3, 8, 8), torch.float32)),
            ("of no pixels", _previews((2, 3, 0, 0), torch.uint8)),
        )
    ],
    _reported("an identity that is null", _json("manifest.json", lambda m: m.update(
        identity=None)), "", accepted=True),
    _reported("an identity without a dataset", _json("manifest.json", lambda m: m[
        "identity"].pop("dataset") and None), "", accepted=True),
    _reported("a row with a teacher of unknown accuracy", _row(teacher="t", teacher_top1=None), "",
              accepted=True),
    *[
        Case(f"an image whose noise stream is {stream!r}", ("set=set", "out=x.png",
             "image=images/0/00000.png"), said, base="run", script="scripts/remake_image.py",
             spoil=_then(_entry(noise_stream=stream), lambda here: shutil.copytree(
                 _one(here, "manifest.json").parent, here / "set")))
        for stream, said in (
            (None, "was copied, not generated"), ("0/0/0/1", "noise_stream is"),
            ("9" * 5000 + "/0/0", "noise_stream is"), ("0/1/0", "class of a noise stream"),
        )
    ],
    _finished("a manifest of its own that is a list", _text("manifest.json", "[]"),
              "its content is"),
    *[
        _finished(f"{file} {what}", spoil, "", accepted=True)
        for file, what, spoil in (
            ("times.json", "that is a list", _text("times.json", "[]")),
            ("times.json", "with text", _text("times.json", '{"sample": "x"}')),
            ("a student's checkpoint", "of another structure", _checkpoint({"x": torch.ones(2)})),
            ("a student's checkpoint", "of another student", _checkpoint(
                {"student.y": torch.ones(2), "epoch": torch.tensor(1),
                 "tested": torch.ones(1, 2), "seconds": torch.ones(2)})),
        )
    ],
    Case("an inventory of another structure", (*FOLDER, "dataset.root=."), "", accepted=True,
         base="tree", spoil=lambda here: [
             ((here / "cache/inventory" / p).mkdir(parents=True),
              (here / "cache/inventory" / p / "cat.json").write_text('{"x": 5}'))
             for p in ("x/train",)]),
    _finished("summary.json that is a folder", _folder("summary.json"),
              "summary.json: a folder is in the way"),
    _finished("table.md that is a folder", _folder("table.md"), "table.md: a folder is in the way"),
    Case("a teacher's file of another network", (*SOFT, "protocol.teacher.weights=w.safetensors"),
         "is not a convnet2_w8 of these 2 classes", base="soft",
         spoil=lambda here: shutil.copy(SHIPPED, here / "w.safetensors")),
    Case("a teacher in the cache that is cut short", SOFT, "", accepted=True, base="soft",
         spoil=_then(_without("results.jsonl"), lambda here: _one(
             here, "cache/students/*.safetensors").write_bytes(b"x"))),
]  # fmt: skip

WEIGHTS = [
    _weight_file("weights of whole numbers", _weights(_to_int8), "is quantised"),
    _weight_file("weights without tokens", _weights(_no_tokens), "pos_embed has no tokens"),
    *[
        _weight_file(f"weights with {what}", _weights(lambda t, m, c=change: m.update(c)), said)
        for what, change, said in (
            ("4 / 0 heads", {"config": '{"num_heads": 0}'}, "num_heads is 0"),
            ("heads that do not divide", {"config": '{"num_heads": 7}'}, "num_heads=7"),
            ("heads that are text", {"config": '{"num_heads": "4"}'}, "num_heads is '4'"),
            ("a configuration that is a list", {"config": "[]"}, "config: its content is"),
            ("a configuration that is no JSON", {"config": "{"}, "config is no JSON"),
            ("classes 5", {"classes": "5"}, "classes: its content is"),
            ("one class too few", {"classes": '["0"]'}, "names 1 classes"),
        )
    ],
    _weight_file("weights that are empty", lambda here: (here / "w.safetensors").touch(),
                 "not a readable weight file"),
    _weight_file("weights that are a folder", lambda here: (here / "w.safetensors").mkdir(), ""),
    _weight_file("weights that are not there", lambda here: None, "does not exist"),
    _weight_file("weights that are a FIFO", _fifo("w.safetensors"), "does not exist|no file"),
]  # fmt: skip

VALUES = [
    _run(f"{override}", override, said=said)
    for override, said in (
        ("dataset.classes=0", "two classes or more"),
        ("dataset.classes=[]", "must be a list"),
        ("dataset.classes=[0]", "two classes or more"),
        ("dataset.classes=[0,0]", "different classes"),
        ("dataset.classes=[11]", "dataset.classes=11 is unknown"),
        ("protocol.augmentation.crop_scale=1", "crop_scale=1"),
        ("protocol.augmentation.crop_scale=[1]", "crop_scale"),
        ("protocol.augmentation.crop_ratio=x", "crop_ratio"),
        ("protocol.many_classes=5", "protocol.many_classes=5"),
        ("protocol.many_classes=null", "protocol.many_classes"),
        ("protocol.optimization=5", "protocol.optimization=5"),
        ("protocol.augmentation=null", "protocol.augmentation"),
        ("protocol.optimization.milestones=5", "milestones"),
        ("protocol.optimization.milestones=[x]", "milestones"),
        ("protocol.epochs_by_ipc=5", "epochs_by_ipc"),
        ("protocol.image_size=100000", "protocol.image_size=100000 is out of range"),
        ("protocol.image_size=x", "protocol.image_size='x' is not an integer"),
        ("students=[convnet2_w99999999]", "convnet2_w99999999 .*parameters"),
        ("students=[convnet2_w3000000]", "convnet2_w3000000 .*parameters"),
        ("students=[nosuch]", "'nosuch' is unknown"),
        ("students=5", "must be a name or a list of names"),
        ("students=[convnet99]", "halves 8 px"),
        ("sampler.cfg_channels=9", "sampler.cfg_channels=9"),
        ("sampler.steps=0", "sampler.steps=0 is out of range"),
        ("sampler.steps=x", "sampler.steps='x' is not an integer"),
        ("guidance.scale=x", "guidance.scale='x' is not a number"),
        ("guidance.scale=nan", "guidance.scale"),
        ("modes._target_=nosuch.X", "modes: nosuch.X cannot be imported"),
        ("modes._target_=os.system", "modes: os.system cannot be imported .*must be a class"),
        ("modes._target_=5", "modes"),
        ("dataset._target_=null", "dataset: its configuration names no class"),
        ("ipc=0", "ipc=0 is out of range"),
        ("ipc=x", "ipc='x' is not an integer"),
        ("ipc=100000", "fewer than the 100000 needed"),
        ("seed=-1", "seed=-1 is out of range"),
        ("pool=0", "pool=0 is out of range"),
        ("compute.batch_size=0", "compute.batch_size"),
        ("compute.workers=0", "compute.workers"),
        ("compute.device=nosuch", "compute.device=nosuch is not available"),
        ("compute.deterministic=perhaps", "compute.deterministic='perhaps' must be true or false"),
        ("compute=null", "compute"),
        ("cache=null", "cache"),
        ("on_step=nosuch.f", "on_step=nosuch.f cannot be imported"),
        ("tracker.mode=x", "is not a key|tracker"),
        ("nosuch=1", "nosuch"),
        ("+nosuch=1", "nosuch"),
        ("nosuch", "is not KEY=VALUE"),
        ("dataset=nosuch", "nosuch"),
        ("dataset=folder", "dataset.root is not set"),
        *((f"{group}=null", f"{group}") for group in (
            "dataset", "backbone", "method", "modes", "guidance", "start", "sampler", "finetune",
            "select", "protocol", "tracker")),
    )
]  # fmt: skip

FILES = [
    Case(name, (*FOLDER, "dataset.root=.", *more), said, base="tree", spoil=spoil)
    for name, spoil, said, more in (
        ("a FIFO named .png", _fifo("train/cat/9.png"), "train/cat/9.png", ()),
        ("a FIFO among test images", _fifo("val/cat/9.png"), "val/cat/9.png", ()),
        ("a decompression bomb", _bomb, "cannot be decoded", ()),
        ("a file that is no image", _text("train/cat/0.png", "x"), "cannot be decoded", ()),
        ("classes.csv with NUL", lambda here: (here / "classes.csv").write_bytes(
            b"folder,name\ncat,a\0b\n"), "classes.csv", ()),
        ("classes.csv with control characters", lambda here: (here / "classes.csv").write_bytes(
            b"folder,name\ncat,a\x1b[31mb\n"), "classes.csv, line 2", ()),
        ("classes.csv with a line break", lambda here: (here / "classes.csv").write_bytes(
            b'folder,name\ncat,"a\nb"\n'), "classes.csv, line 2", ()),
        ("classes.csv that is a folder", lambda here: (here / "classes.csv").mkdir(),
         "classes.csv", ()),
        ("a class folder with a control character", lambda here: [
            shutil.copytree(here / s / "cat", here / s / "c\x1b[31mat") for s in ("train", "val")],
         "control character", ()),
        ("one class", lambda here: [shutil.rmtree(here / s / "dog") for s in ("train", "val")],
         "two classes or more", ()),
        ("a root that is a file", lambda here: (here / "f").touch(), "dataset.root", (
            "dataset.root=f",)),
    )
] + [
    Case("a decompression bomb that is left out", (*FOLDER, "dataset.root=.", "report=true",
         "dataset.skip_broken=true"), "", base="tree", spoil=_bomb, accepted=True),
    Case("a FIFO in an own folder", ("images=own", *EVALUATE), "own/0/b.png",
         script="scripts/evaluate.py", spoil=_then(_own_images(), _fifo("own/0/b.png"))),
    Case("a file that is no image in an own folder", ("images=own", *EVALUATE), "own/0/b.png",
         script="scripts/evaluate.py", spoil=_own_images("0/b.png")),
    _run("ipc=0 with a linked run dir", "ipc=0", "hydra.run.dir=link", spoil=_linked_run,
         said="ipc=0 is out of range"),
    _run("files may not be large", spoil=lambda here: None, said="may not be so large",
         options={"file_limit": 2000}),
    _run("a run dir of a name too long", f"hydra.run.dir={'x' * 300}", said="name is too long"),
    _run("runs of a name too long", f"runs={'y' * 300}", said="name is too long"),
    _run("a closed folder", "runs=closed/runs", spoil=_read_only_target, said="no permission",
         options={"as_nobody": True}),
    _run("a file in the way", "runs=f", spoil=lambda here: (here / "f").touch(), said="in the way"),
    _run("a cache where none can be", "cache=/proc/x", said="no such place can be made"),
    _run("a value that needs quotes", "dataset.root=/a, b (c)", said="two kinds of quotes"),
    Case("an evaluation of nothing", ("images=nosuch", *EVALUATE), "is not a folder",
         script="scripts/evaluate.py"),
    Case("a report of nothing", ("folder=nosuch",), "holds no finished run",
         script="scripts/report.py"),
    Case("a teacher of a protocol without", (*TEACHER[:2], "protocol=hard_label_short"),
         "has no teacher", script="scripts/train_teacher.py"),
]  # fmt: skip

SHARED = [
    Case(
        f"{what} in a folder that cannot be written", (*overrides, "cache=shared"), "",
        base=base, spoil=_shared, options={"as_nobody": True}, accepted=True,
    )
    for what, overrides, base in (
        ("a complete cache of a run", RUN, "run"),
        ("a complete cache with a teacher", SOFT, "soft"),
    )
] + [
    Case(
        "a teacher's weights in a folder that cannot be written",
        (*SOFT, "protocol.teacher.weights=shared/teacher.safetensors"), "",
        base="soft", spoil=_shared_teacher, options={"as_nobody": True}, accepted=True,
    ),
]  # fmt: skip

CASES = [*FOREIGN_CODE, *SHARED, *NOTHING_LOST, *STRUCTURES, *WEIGHTS, *VALUES, *FILES]

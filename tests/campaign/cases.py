"""Bad inputs: a command, how its folder is spoilt before it, and what it must say."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from conftest import QUICK

from campaign.spoiling import (
    CANARY,
    SHIPPED,
    altered,
    as_fifo,
    as_folder,
    checkpoint,
    content,
    entry_with,
    fifo_at,
    first,
    in_turn,
    link_image_out,
    link_rows,
    link_scores,
    linked_run,
    no_tokens,
    only_logs,
    own_images,
    own_link,
    pickle_at,
    pixel_bomb,
    previews,
    program_at,
    read_only_target,
    removed,
    replace_image,
    row_with,
    shared_cache,
    shared_teacher,
    to_int8,
    users_folder,
    weights,
)
from campaign.stages import BACKBONE, FEW_STEPS, FOLDER, SOFT, STUDENT, TEACHER, TWO_CLASSES

RUN = (*QUICK, *TWO_CLASSES, *FEW_STEPS)
EVALUATE = (
    "dataset.classes=[0,1]", STUDENT, "protocol.epochs_by_ipc=[[null,2]]", "compute.device=cpu",
)  # fmt: skip
POPEN = {"_target_": "subprocess.Popen", "args": f"touch {CANARY}", "shell": True}


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
        altered("manifest.json", lambda m: m["identity"].update(dataset=POPEN)), "", accepted=True,
    ),
    _reported(
        "a manifest's dataset has a class among its values",
        altered("manifest.json", lambda m: m["identity"]["dataset"].update(values=POPEN)), "",
        accepted=True,
    ),
    _scored(
        "a scored manifest's dataset is a class",
        altered("manifest.json", lambda m: m["identity"].update(dataset=POPEN)), "", accepted=True,
    ),
    *[
        Case(
            f"an image is made again from a manifest with {what}",
            ("image=images/0/00000.png", "set=set", "out=x.png"), said,
            spoil=in_turn(
                altered("manifest.json", lambda m, c=change: m["identity"].update(c)),
                lambda here: shutil.copytree(first(here, "manifest.json").parent, here / "set"),
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
            "not a readable weight file", spoil=program_at(n, more),
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
            "not a readable weight file", spoil=pickle_at(n),
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
    _run("a user's folder as run dir", "hydra.run.dir=mine", spoil=users_folder,
         said="not empty and no run of this project .*README.md, .*nothing is written there"),
    _run("a user's folder of logs as run dir", "hydra.run.dir=mine", spoil=only_logs,
         said="not empty and no run of this project .*run.log"),
    Case("a user's folder as a sweep's", ("-m", *RUN, "hydra.sweep.dir=.",
         "hydra.sweep.subdir=mine", "seed=0,1"), "not empty and no run of this project",
         spoil=users_folder),
    Case("a user's folder as an evaluation's", ("images=own", *EVALUATE, "hydra.run.dir=mine"),
         "not empty and no run of this project", script="scripts/evaluate.py",
         spoil=in_turn(users_folder, own_images())),
    _reported("a user's own report.html beside runs", lambda here: (
        here / "runs/report.html").write_text("mine"), "that is not this script's"),
    _reported("a user's own summary.json beside runs", lambda here: (
        here / "runs/summary.json").write_text("[1]"), "summary.json: its content is"),
    Case("an evaluated dataset's name leads out", ("images=own", "dataset=folder",
         "dataset.root=.", "dataset.name=../x", "dataset.student_size=8", STUDENT),
         "dataset.name='../x' is no name", base="tree", script="scripts/evaluate.py"),
    Case("a user's folder as a training's", (*BACKBONE, "hydra.run.dir=mine"),
         "not empty and no run of this project", script="scripts/train_backbone.py",
         spoil=users_folder),
    _finished("another run's folder as run dir", lambda here: first(here, "hard_label*").rename(
        here / "other"), "left as it is|already holds a run with other values", "seed=5",
        "hydra.run.dir=other"),
    _run("dataset.name leads out", "dataset.name=../..", said="dataset.name='../..' is no name"),
    _run("method.name leads out", "method.name=../x", said="method.name='../x' is no name"),
    _run("protocol.name leads out", "protocol.name=a/b", said="protocol.name='a/b' is no name"),
    _run("a long name", f"dataset.name={'x' * 300}", said="dataset.name=.* is no name"),
    Case("a title leads out", ("images=own", *EVALUATE, "title=../../../x"),
         r"title='../../../x' is no name", script="scripts/evaluate.py", spoil=own_images()),
    Case("a title of several lines", ("images=own", *EVALUATE, 'title="a\nb"'),
         r"title='a\\nb' is no name", script="scripts/evaluate.py", spoil=own_images()),
    Case("the file of another training as backbone.weights", BACKBONE,
         "comes from elsewhere .*not overwritten", script="scripts/train_backbone.py",
         spoil=lambda here: ((here / "own").mkdir(),
                             shutil.copy(SHIPPED, here / "own/weights.safetensors"))),
    _scored("a manifest's file leads out", entry_with(file="../../../../../../../x.png"),
            "names an image outside its folder"),
    _scored("a manifest's file is a whole path", entry_with(file="/etc/hostname"),
            "names an image outside its folder"),
    _scored("a set's image is a link out", link_image_out, "is a link, and links below"),
    _reported("a reported set's image is a link out", link_image_out, "", accepted=True),
    _scored("a set's score folder is a link out", link_scores, "is a link, and links below"),
    _finished("a run's rows are a link out", link_rows, "is a link, and links below"),
    _reported("a manifest names a folder of this machine", altered("manifest.json", lambda m: m[
        "identity"].update(dataset={"choice": "folder", "values": {"root": "/etc"}})), "",
        accepted=True),
    Case("a finished run's folder as a measurement's", ("images=runs", "dataset.classes=[0,1]",
         "metrics=pixels", "hydra.run.dir=there"), "not empty and no run of this project",
         base="run", script="scripts/measure.py", spoil=lambda here: shutil.copytree(
             first(here, "hard_label*"), here / "there")),
    Case("a user's multirun.yaml", ("-m", *RUN, "hydra.sweep.dir=mine", "seed=0,1"),
         "multirun.yaml is not Hydra's", spoil=in_turn(users_folder, lambda here: (
             here / "mine/multirun.yaml").write_text("mine"))),
    Case("an image is made again over the set's own", ("set=set", "image=images/0/00000.png",
         "out=set/images/0/00000.png"), "lies in the set", base="run",
         script="scripts/remake_image.py",
         spoil=lambda here: shutil.copytree(first(here, "manifest.json").parent, here / "set")),
    Case("an own folder's image is a link out", ("images=own", *EVALUATE),
         "is a link, and links below own", script="scripts/evaluate.py", spoil=own_link),
    _finished("a row of another run", row_with(run_id="00000000", top1_last=99.9, top1_best=99.9),
              "is of run 00000000, but this folder is run"),
    _reported("a reported row of another run", row_with(run_id="00000000", top1_last=99.9),
              "is of run 00000000, but this folder is run"),
    *[
        _finished(f"a row with {what}", row_with(**values), f"results.jsonl, line 1: {said}")
        for what, values, said in (
            ("a score that is text", {"top1_last": "99"}, "top1_last is '99'"),
            ("no score", {"top1_last": None}, "top1_last is None"),
            ("a score that is no number", {"top1_best": float("nan")}, "top1_best is nan"),
            ("a score above 100", {"top1_best": 101.0}, "top1_best is 101.0"),
            ("a negative seed", {"student_seed": -1}, "student_seed is -1"),
            ("another method's path", {"method": "../x"}, "method is '../x'"),
        )
    ],
    _finished("a row that is a list", content("results.jsonl", "[]\n"), r"line 1: its content is"),
    _finished("a row that is no JSON", content("results.jsonl", "{x\n"), "line 1 is no JSON"),
    _reported("a reported row that is no JSON", content("results.jsonl", "{x\n"), "is no JSON"),
    _finished("an image of a finished set was replaced", replace_image,
              "1 images of .* are missing or differ from the manifest's checksums"),
    _scored("a scored set's image was replaced", replace_image, "manifest's checksums"),
]  # fmt: skip


STRUCTURES = [
    *[
        _scored(f"a scored manifest {what}", spoil, f"manifest.json:? .*{said}.*{_WHOLE}")
        for what, spoil, said in (
            ("that is a list", content("manifest.json", "[]"), "its content is"),
            ("that is empty", content("manifest.json", "{}"), "is missing"),
            ("that is no JSON", content("manifest.json", "{"), "is no JSON"),
            ("that is bytes", content("manifest.json", b"\xff\xfe\0"), "is no JSON"),
            ("without classes", altered("manifest.json", lambda m: m.pop("classes") and None),
             "classes is missing"),
            ("without digests", altered(
                "manifest.json", lambda m: m["images"][0].pop("sha256") and None),
             "images.0.sha256 is missing"),
            ("with an IPC that is text", altered("manifest.json", lambda m: m.update(ipc="2")),
             "ipc is '2'"),
            ("with images that are text", altered("manifest.json", lambda m: m.update(images="x")),
             "images is 'x'"),
            ("with a class that leads out", altered(
                "manifest.json", lambda m: m["classes"][0].update(wnid="../x")),
             "classes.0.wnid is"),
        )
    ],
    _scored("a scored manifest that is a folder", as_folder("manifest.json"), ""),
    *[
        _finished(f"{file} {what}", spoil(file), said)
        for file in ("identity.json", "protocol.json")
        for what, spoil, said in (
            ("that is a list", lambda f: content(f, "[]"), "its content is"),
            ("that is empty", lambda f: content(f, "{}"), "earlier version"),
            ("that is no JSON", lambda f: content(f, "x"), "is no JSON"),
            ("with data of another kind", lambda f: altered(f, lambda c: c.update(data=5)),
             "data is 5"),
            ("with files of another kind", lambda f: altered(f, lambda c: c.update(files=[1])),
             "files is"),
            ("that is a folder", as_folder, "Is a directory|cannot be read"),
        )
    ],
    *[
        _finished(f"{file} that is a FIFO", as_fifo(file), "it is no file")
        for file in ("identity.json", "protocol.json", "manifest.json")
    ],
    _scored("a set's image that is a FIFO", as_fifo("images/*/*.png"), "are missing or differ"),
    *[
        _reported(f"previews {what}", spoil, "", accepted=True)
        for what, spoil in (
            ("that are a FIFO", as_fifo("previews.safetensors")),
            ("that are numbers", previews((), torch.uint8)),
            ("of five channels", previews((2, 5, 8, 8), torch.uint8)),
            ("of fractions", previews((2, 3, 8, 8), torch.float32)),
            ("of no pixels", previews((2, 3, 0, 0), torch.uint8)),
        )
    ],
    _reported("an identity that is null", altered("manifest.json", lambda m: m.update(
        identity=None)), "", accepted=True),
    _reported("an identity without a dataset", altered("manifest.json", lambda m: m[
        "identity"].pop("dataset") and None), "", accepted=True),
    _reported("a row with a teacher of unknown accuracy", row_with(
        teacher="t", teacher_top1=None), "", accepted=True),
    *[
        Case(f"an image whose noise stream is {stream!r}", ("set=set", "out=x.png",
             "image=images/0/00000.png"), said, base="run", script="scripts/remake_image.py",
             spoil=in_turn(entry_with(noise_stream=stream), lambda here: shutil.copytree(
                 first(here, "manifest.json").parent, here / "set")))
        for stream, said in (
            (None, "was copied, not generated"), ("0/0/0/1", "noise_stream is"),
            ("9" * 5000 + "/0/0", "noise_stream is"), ("0/1/0", "class of a noise stream"),
        )
    ],
    _finished("a manifest of its own that is a list", content("manifest.json", "[]"),
              "its content is"),
    *[
        _finished(f"{file} {what}", spoil, "", accepted=True)
        for file, what, spoil in (
            ("times.json", "that is a list", content("times.json", "[]")),
            ("times.json", "with text", content("times.json", '{"sample": "x"}')),
            ("a student's checkpoint", "of another structure", checkpoint({"x": torch.ones(2)})),
            ("a student's checkpoint", "of another student", checkpoint(
                {"student.y": torch.ones(2), "epoch": torch.tensor(1),
                 "tested": torch.ones(1, 2), "seconds": torch.ones(2)})),
        )
    ],
    Case("an inventory of another structure", (*FOLDER, "dataset.root=."), "", accepted=True,
         base="tree", spoil=lambda here: [
             ((here / "cache/inventory" / p).mkdir(parents=True),
              (here / "cache/inventory" / p / "cat.json").write_text('{"x": 5}'))
             for p in ("x/train",)]),
    _finished("summary.json that is a folder", as_folder("summary.json"),
              "summary.json: a folder is in the way"),
    _finished("table.md that is a folder", as_folder("table.md"),
              "table.md: a folder is in the way"),
    Case("a teacher's file of another network", (*SOFT, "protocol.teacher.weights=w.safetensors"),
         "is not a convnet2_w8 of these 2 classes", base="soft",
         spoil=lambda here: shutil.copy(SHIPPED, here / "w.safetensors")),
    Case("a teacher in the cache that is cut short", SOFT, "", accepted=True, base="soft",
         spoil=in_turn(removed("results.jsonl"), lambda here: first(
             here, "cache/students/*.safetensors").write_bytes(b"x"))),
]  # fmt: skip


WEIGHTS = [
    _weight_file("weights of whole numbers", weights(to_int8), "is quantised"),
    _weight_file("weights without tokens", weights(no_tokens), "pos_embed has no tokens"),
    *[
        _weight_file(f"weights with {what}", weights(lambda t, m, c=change: m.update(c)), said)
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
    _weight_file("weights that are a FIFO", fifo_at("w.safetensors"), "does not exist|no file"),
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
        ("dataset.student_size=null", "None is not an integer"),
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
        ("a FIFO named .png", fifo_at("train/cat/9.png"), "train/cat/9.png", ()),
        ("a FIFO among test images", fifo_at("val/cat/9.png"), "val/cat/9.png", ()),
        ("a decompression bomb", pixel_bomb, "cannot be decoded", ()),
        ("a file that is no image", content("train/cat/0.png", "x"), "cannot be decoded", ()),
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
         "dataset.skip_broken=true"), "", base="tree", spoil=pixel_bomb, accepted=True),
    Case("a FIFO in an own folder", ("images=own", *EVALUATE), "own/0/b.png",
         script="scripts/evaluate.py", spoil=in_turn(own_images(), fifo_at("own/0/b.png"))),
    Case("a file that is no image in an own folder", ("images=own", *EVALUATE), "own/0/b.png",
         script="scripts/evaluate.py", spoil=own_images("0/b.png")),
    _run("ipc=0 with a linked run dir", "ipc=0", "hydra.run.dir=link", spoil=linked_run,
         said="ipc=0 is out of range"),
    _run("files may not be large", spoil=lambda here: None, said="may not be so large",
         options={"file_limit": 2000}),
    _run("a run dir of a name too long", f"hydra.run.dir={'x' * 300}", said="name is too long"),
    _run("runs of a name too long", f"runs={'y' * 300}", said="name is too long"),
    _run("a closed folder", "runs=closed/runs", spoil=read_only_target, said="no permission",
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
        base=base, spoil=shared_cache, options={"as_nobody": True}, accepted=True,
    )
    for what, overrides, base in (
        ("a complete cache of a run", RUN, "run"),
        ("a complete cache with a teacher", SOFT, "soft"),
    )
] + [
    Case(
        "a teacher's weights in a folder that cannot be written",
        (*SOFT, "protocol.teacher.weights=shared/teacher.safetensors"), "",
        base="soft", spoil=shared_teacher, options={"as_nobody": True}, accepted=True,
    ),
]  # fmt: skip


CASES = [*FOREIGN_CODE, *SHARED, *NOTHING_LOST, *STRUCTURES, *WEIGHTS, *VALUES, *FILES]

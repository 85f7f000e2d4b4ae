"""What is killed, interrupted and raced: every kind of work that writes files, made short."""

import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import QUICK, image

from campaign.processes import Finished, child

TWO_CLASSES = ("dataset.classes=[0,1]", "ipc=2")
FEW_STEPS = ("sampler.steps=4", "guidance.stop_t=1")
STUDENT = "students=[convnet2_w8]"
SMALL = (*QUICK, *TWO_CLASSES, *FEW_STEPS, "compute.batch_size=3", "student_seeds=2")
SOFT = (
    "tracker=none", "report=false", "compute.device=cpu", "method=random", *TWO_CLASSES, STUDENT,
    "student_seeds=2", "protocol=soft_label_short", "protocol.epochs=3",
    "protocol.answers.source=stored", "protocol.teacher.student=convnet2_w8",
    "protocol.teacher.epochs=4", "protocol.teacher.minimum_top1=0",
)  # fmt: skip
FINE_TUNING = (
    *QUICK[1:], *TWO_CLASSES, *FEW_STEPS, "backbone=dit_digits", "finetune=self_adaptive_memory",
    "finetune.epochs=1", "finetune.batch_size=32", "finetune.checkpoint_steps=2",
)  # fmt: skip
BACKBONE = (
    "dataset=digits", "dataset.classes=[0,1]", "backbone=dit_digits", "compute.device=cpu",
    "backbone.weights=own/weights.safetensors", "train.hidden_size=16", "train.depth=1",
    "train.batch_size=8", "train.steps=6", "train.checkpoint_steps=2",
)  # fmt: skip
TEACHER = (
    "dataset.classes=[0,1]", "compute.device=cpu", "protocol=soft_label_short",
    "protocol.teacher.student=convnet2_w8", "protocol.teacher.epochs=4",
    "protocol.teacher.minimum_top1=0",
)  # fmt: skip
MATCHING = (
    *QUICK[1:], *TWO_CLASSES, "method=dm", "method.iterations=6", "method.real_batch=16",
    "method.checkpoint_iterations=2", "features.student=convnet2_w8",
)  # fmt: skip
TABLE = (
    "table=5", "rehearsal=true", "only.seed=0", "only.student=convnet6",
    'only.row="Random (seeded)","mode discovery only (closest real)"',
    "protocol.epochs_by_ipc=[[null,2]]", "dataset.classes=[0,1]",
)  # fmt: skip
FOLDER = (
    *QUICK, *FEW_STEPS, "dataset=folder", "dataset.student_size=8", "backbone.image_size=8",
    "ipc=2", "protocol=hard_label_short",
)  # fmt: skip
FEATURES = ("features=student", "features.student=convnet2_w8", "features.epochs=2")


def _nothing(inputs: Path) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Stage:
    """A command that ends with the same files whatever happens to it on its way.

    `prepare` makes what it reads in a folder of its own, outside the one that is compared, and
    returns the overrides that name it; what it puts into `here` is copied to where it runs.
    """

    name: str
    overrides: tuple[str, ...]
    script: str = "run.py"
    prepare: Callable[[Path], tuple[str, ...]] = _nothing
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name, as a path that Hydra takes without quotes."""
        return re.sub(r"\W+", "_", self.name)


@dataclass(frozen=True)
class Prepared:
    """A stage whose inputs are there."""

    stage: Stage
    inputs: Path
    named: tuple[str, ...]  # the overrides that name them

    @property
    def overrides(self) -> tuple[str, ...]:
        """Of the command."""
        return (*self.stage.overrides, *self.named)

    def folder(self, cwd: Path) -> Path:
        """A new folder to run in."""
        here = self.inputs / "here"
        if here.is_dir():
            shutil.copytree(here, cwd)
        else:
            cwd.mkdir(parents=True)
        return cwd

    def run(self, cwd: Path, more: tuple[str, ...] = (), **options: object) -> Finished:
        """The command with `more` overrides; students write checkpoints after every epoch."""
        options = {"checkpoint_seconds": 0, **self.stage.environment, **options}
        return child(cwd, *self.overrides, *more, script=self.stage.script, **options)


def prepared(stage: Stage, inputs: Path) -> Prepared:
    """Make what a stage reads."""
    inputs.mkdir(parents=True)
    return Prepared(stage, inputs, stage.prepare(inputs))


def _images_of_own(inputs: Path) -> tuple[str, ...]:
    for wnid in "01":
        (inputs / "theirs" / wnid).mkdir(parents=True)
        for k in range(2):
            image(seed=10 * int(wnid) + k, size=(8, 8)).save(inputs / f"theirs/{wnid}/{k}.png")
    return (f"images={inputs / 'theirs'}",)


def _tree(inputs: Path) -> tuple[str, ...]:
    for split, images in (("train", 5), ("val", 2)):
        for label, wnid in enumerate(("cat", "dog")):
            folder = inputs / "tree" / split / wnid
            folder.mkdir(parents=True)
            for i in range(images):
                image(seed=100 * label + i).save(folder / f"{i}.png")
    return (f"dataset.root={inputs / 'tree'}",)


def _finished_runs(inputs: Path) -> tuple[str, ...]:
    (inputs / "here").mkdir()
    done = child(inputs / "here", "-m", *QUICK, *TWO_CLASSES, *FEW_STEPS, "method=random,mgd3")
    assert done.returncode == 0, done.stderr
    return ()


class _DropsOnce(BaseHTTPRequestHandler):
    """Sends half a file, then the rest to those who ask for it."""

    protocol_version = "HTTP/1.1"
    body = b""

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(self.body) - start))
        self.end_headers()
        self.wfile.write(self.body[start : None if asked else len(self.body) // 2])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


def _server(inputs: Path) -> tuple[str, ...]:
    import torch  # seconds, here alone
    from networks import compvis_tensors

    with tempfile.NamedTemporaryFile() as made:
        torch.save({"state_dict": compvis_tensors()}, made.name)
        body = Path(made.name).read_bytes()
    handler = type("Handler", (_DropsOnce,), {"body": body})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()  # as long as the campaign
    return f"source=http://127.0.0.1:{http.server_port}/model.ckpt", "insecure=true"


STAGES = (
    Stage("mgd3, two students", SMALL),
    Stage("soft labels, stored answers", SOFT),
    Stage("fine-tuning", FINE_TUNING),
    Stage("train_backbone", BACKBONE, "scripts/train_backbone.py"),
    Stage("train_teacher", TEACHER, "scripts/train_teacher.py"),
    Stage("fetch_weights", (), "scripts/fetch_weights.py", _server, {"MGD3_WEIGHTS": "weights"}),
    Stage(
        "evaluate",
        ("dataset=digits", "dataset.classes=[0,1]", STUDENT, *QUICK[-2:]),
        "scripts/evaluate.py",
        _images_of_own,
    ),
    Stage(
        "pool, moments",
        (*QUICK, *TWO_CLASSES, *FEW_STEPS, "pool=2", "select=moments", *FEATURES),
    ),
    Stage("dm", MATCHING),
    Stage("herding", (*QUICK[1:], *TWO_CLASSES, "method=herding", *FEATURES)),
    Stage("report", ("folder=runs",), "scripts/report.py", _finished_runs),
    Stage(
        "reproduce",
        TABLE,
        "scripts/reproduce.py",
    ),
    Stage(
        "dataset=folder",
        FOLDER,
        "run.py",
        _tree,
    ),
)

"""What a run would take on a machine that is not here, by the stated rates of machines.yaml."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from eval.protocols.recipe import EvalProtocol
from eval.protocols.trial import tried
from eval.students.registry import expand_students, make_student
from mgd3.config import identity
from mgd3.config.build import build, build_protocol
from mgd3.config.schema import CONFIGS, choices, plain, student_names
from mgd3.data.class_lists import read_class_list
from mgd3.data.datasets import select_classes
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.stages import duration

_PNG = 1.7  # bytes per pixel, as photographs take
_LARGEST_BATCH = 128  # of sampling and encoding
_FEW = 2  # images of a batch that tells what one takes
_STATED = (
    "Nothing of this was measured on such a machine: counted work by {gpu}'s peak and an assumed "
    "share of it, and by seconds of one processor core (configs/machines.yaml has every number). "
    "GPU-hours are of all GPUs together; time is of {gpus} GPU{s} and {threads} of {cores} cores "
    "({workers} threads a process, compute.workers)."
)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage takes."""

    stage: str
    gpu: float = 0.0  # seconds of one GPU
    cpu: float = 0.0  # seconds of one core
    gpus: int = 1  # that share it
    threads: int = 1
    disk: float = 0.0  # bytes that it leaves
    memory: float = 0.0  # bytes of each GPU

    @property
    def seconds(self) -> float:
        """Of the clock: cores work ahead of the GPU."""
        return max(self.gpu / self.gpus, self.cpu / self.threads)


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    classes: int
    train: int
    val: int


@cache
def _stated() -> Mapping[str, Any]:
    return _numbers(plain(OmegaConf.load(Path(CONFIGS, "machines.yaml"))))


def _numbers(node: Any) -> Any:
    """YAML's 67e12 is a word to its reader, a number to people."""
    if isinstance(node, dict):
        return {key: _numbers(value) for key, value in node.items()}
    try:
        return float(node) if isinstance(node, str) else node
    except ValueError:
        return node


def print_machine_plan(cfg: DictConfig, name: str) -> None:
    """A line for every stage: GPU-hours, time, disk, memory."""
    known = _stated()["machines"]
    machine = known[checks.choice("plan", name, ["true", "false", *known])]
    cfg.compute.device = "cpu"  # here; nothing of the run is computed
    workers = min(cfg.compute.workers, machine["cores"] // machine["gpus"])
    costs = list(_costs(cfg, machine, workers, _sizes(cfg)))
    table = Table(title=f"{name}: {cfg.dataset.name}, {cfg.method.name}, ipc {cfg.ipc}")
    table.add_column("stage")
    for title in ("GPU-hours", "time", "disk, GB", "GPU memory, GB"):
        table.add_column(title, justify="right")
    for cost in costs:
        table.add_row(cost.stage, *_cells(cost.gpu, cost.seconds, cost.disk, cost.memory))
    table.add_section()
    gpu, seconds, disk = (sum(getattr(c, key) for c in costs) for key in ("gpu", "seconds", "disk"))
    table.add_row("all", *_cells(gpu, seconds, disk, max(cost.memory for cost in costs)))
    console = Console(width=120)
    console.print(table)
    threads = workers * machine["gpus"]
    words = {**machine, "s": "s" * (machine["gpus"] > 1), "threads": threads, "workers": workers}
    console.print(_STATED.format(**words), markup=False, highlight=False)


def _cells(gpu: float, seconds: float, disk: float, memory: float) -> list[str]:
    figures = gpu / 3600, disk / 1e9, memory / 1e9
    hours, gigabytes, held = (f"{value:.2f}" if value else "" for value in figures)
    return [hours, duration(seconds), gigabytes, held]


def _sizes(cfg: DictConfig) -> _Sizes:
    """Of the images that are here; else of ImageNet's classes."""
    if "download" in cfg.dataset:
        cfg.dataset.download = False  # a plan fetches nothing
    try:
        dataset = build(cfg, "dataset")
    except UserError:
        known = cfg.dataset.get("class_list")
        if known is None:
            raise
        count = len(select_classes(read_class_list(known), plain(cfg.dataset.classes)))
        images, most = _stated()["images"], cfg.dataset.get("max_per_class") or math.inf
        of_class = min(images["train"], most)
        return _Sizes(classes=count, train=round(count * of_class), val=count * images["val"])
    labels = range(len(dataset.classes))
    train, val = (sum(len(dataset.images(s, label)) for label in labels) for s in ("train", "val"))
    return _Sizes(classes=len(labels), train=train, val=val)


def _costs(
    cfg: DictConfig, machine: Mapping[str, Any], workers: int, sizes: _Sizes
) -> Iterator[Cost]:
    """Stage by stage, in a run's order."""
    stated, read = _stated(), identity.reads(cfg)
    looks = sizes.val
    if identity.set_reads_train(cfg) or identity.protocol_reads_train(cfg):
        looks += sizes.train
    yield Cost(
        stage=f"looks at {looks:,} real images",
        cpu=looks * stated["seconds"]["check"],
        threads=workers,  # the first process alone
        disk=looks * stated["images"]["bytes"],
    )
    if "backbone" in read:
        yield from _making(cfg, machine, workers, sizes, "modes" in read)
    elif cfg.method.name not in ("random", "first_files", "full"):
        raise _unstated("method", cfg.method.name)
    yield from _students(cfg, machine, sizes)


def _unstated(key: str, value: str, others: str = "") -> UserError:
    return UserError(
        f"{key}={value}: configs/machines.yaml states no rate for it{others}; plan=true counts by "
        "what was measured on this machine"
    )


def _making(
    cfg: DictConfig, machine: Mapping[str, Any], workers: int, sizes: _Sizes, modes: bool
) -> Iterator[Cost]:
    """Encoding and modes where the method has some, sampling, decoding."""
    stated, backbone = _stated(), choices(cfg)["backbone"]
    network = stated["networks"].get(backbone)
    if network is None:
        raise _unstated("backbone", backbone, f"; for {', '.join(stated['networks'])} there is")
    if choices(cfg)["finetune"] != "none":
        raise _unstated("finetune", choices(cfg)["finetune"])
    gpus, seconds = machine["gpus"], stated["seconds"]
    together = {"gpus": gpus, "threads": workers * gpus}
    pixels, images = cfg.backbone.image_size**2, sizes.classes * cfg.ipc
    # two maps of 128 channels at full size, in and out of a convolution, float32
    map_bytes = 4 * 128 * pixels * 4
    if modes:
        yield Cost(
            stage=f"encodes {sizes.train:,} images, {cfg.compute.encoding_precision}",
            gpu=sizes.train * network["encode"] / _rate(machine, "vae", cfg, "encoding_precision"),
            cpu=sizes.train * seconds["decode"],
            disk=sizes.train * network["latent_bytes"],
            memory=_LARGEST_BATCH * map_bytes,
            **together,
        )
        share = sizes.train / 1300 * cfg.ipc / 50
        yield Cost(
            stage=f"finds {cfg.ipc} modes in each of {sizes.classes:,} classes",
            cpu=share * seconds["clustering"],
            disk=images * network["latent_bytes"],
            **together,
        )
    made = images * cfg.pool
    yield Cost(
        stage=f"samples {made:,} images in {cfg.sampler.steps} steps, {cfg.compute.precision}",
        gpu=made * 2 * cfg.sampler.steps * network["step"] / _rate(machine, "transformer", cfg),
        memory=network["parameters"] * 4 + _LARGEST_BATCH * pixels * 4 * 17,
        **together,
    )
    yield Cost(
        stage="decodes them and writes PNG files",
        gpu=made * network["decode"] / _rate(machine, "vae", cfg),
        cpu=made * seconds["png"] * pixels / 256**2,
        disk=made * pixels * _PNG,
        memory=16 * map_bytes,
        **together,
    )


def _students(cfg: DictConfig, machine: Mapping[str, Any], sizes: _Sizes) -> Iterator[Cost]:
    """The teacher's answers, and each student's training and tests."""
    protocol: EvalProtocol = build_protocol(cfg)
    images, gpus = sizes.classes * cfg.ipc, machine["gpus"]
    rate = _rate(machine, "student", cfg, "training_precision")
    names, seeds = expand_students(student_names(cfg)), cfg.student_seeds
    shared = min(gpus, seeds) if cfg.compute.parallel == "students" else gpus
    side = protocol.image_size
    pixels = (images + sizes.val) * 3 * getattr(protocol, "stored_size", side) ** 2
    for name in names:
        recipe = protocol.recipe(cfg.ipc, sizes.classes, name)
        seen = images * recipe.epochs
        teacher: Any = getattr(protocol, "teacher_options", None)
        if teacher is not None:
            stored = protocol.answers.source == "stored"  # type: ignore[attr-defined]
            asked = seen if stored else seen * seeds
            yield Cost(
                stage=f"a teacher, {teacher.student}, answers {asked:,} times for {name}",
                gpu=asked * forward(teacher.student, sizes.classes, side) / rate,
                gpus=1 if stored else shared,
                disk=seen * sizes.classes * 2 * stored,
            )
        own = forward(name, sizes.classes, side)
        own_bytes = tried(name, side, sizes.classes, _FEW, torch.device("cpu")).bytes / _FEW
        tested = sizes.val * len(recipe.tests)
        yield Cost(
            stage=f"trains {seeds} {name} for {recipe.epochs} epochs, {len(recipe.tests)} tests",
            gpu=seeds * (3 * seen + tested) * own / rate,
            gpus=shared,
            memory=pixels + min(recipe.batch_size, images) * own_bytes,
        )


def _rate(
    machine: Mapping[str, Any], kind: str, cfg: DictConfig, precision: str = "precision"
) -> float:
    """FLOP per second of one GPU in one of compute's precisions."""
    stated, name = _stated(), cfg.compute[precision]
    checks.choice(f"compute.{precision}", name, stated["share"][kind])
    return stated["gpus"][machine["gpu"]][name] * stated["share"][kind][name]


def forward(student: str, classes: int, side: int) -> float:
    """FLOP of one image's forward pass, counted without computing any."""
    net = make_student(student, classes, side, seed=0).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops()

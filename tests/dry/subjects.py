"""What is run on the dry device: every path of product code that would compute on a GPU, small.

A subject is a function (device, amount, folder) -> work. Making it may copy what stays on the
device (networks, whole sets); `work()` does `amount` steps and gives values, wherever they are. Its
folder lies in one that all share, with the small networks' files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch
from conftest import image
from networks import compvis_tensors, small_stable_diffusion, small_vae
from support import GOLDEN, composed

from dry.count import counts
from eval.metrics.coverage import Coverage
from eval.metrics.features import StudentExtractor
from eval.metrics.measuring import features_by_class
from eval.metrics.set_metrics import measure
from eval.protocols.recipe import Teacher
from eval.protocols.training import StudentTraining
from eval.students.registry import make_student
from mgd3.backbones.dit import DiT
from mgd3.backbones.ldm import LDM
from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.backbones.toy import Toy
from mgd3.backbones.weights.dit_weights import build_network
from mgd3.config.build import build, build_distiller, build_protocol
from mgd3.data.datasets import ImageTree
from mgd3.data.digits import DigitsParity
from mgd3.data.inventory import take_inventory
from mgd3.data.pixels import from_pil
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.finetuning.from_scratch import Trainer, TrainSettings
from mgd3.modes.finders import KMeansModes
from mgd3.modes.latents import LatentCache
from mgd3.runtime.compute import Compute, Work, pick_device
from mgd3.sampling.guidance import ModeGuidance, NoGuidance, TangentModeGuidance
from mgd3.sampling.samplers import DDIM, DDPM, ReleasedDDIM
from mgd3.storage.tensors import load_tensors

Values = dict[str, torch.Tensor]
Make = Callable[[str, int, Path], Callable[[], Values]]

CLASSES = ("n01440764", "n01443537")  # ImageNet's first two, which every network here knows
DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"
BATCH, SIZE = 8, 16  # of students' images


@dataclass(frozen=True)
class Subject:
    """One thing that is run; a step is what `step` says."""

    name: str
    step: str
    make: Make
    amount: int  # steps of the first measurement; the second, if any, does twice as many
    pixels: int  # bytes of a step's images as uint8
    process: str  # subjects of one name share a process, and the networks that it has loaded


def weights(folder: Path) -> None:
    """Write the small networks that the backbones read."""
    small_vae(folder / "vae")
    torch.save({"state_dict": compvis_tensors()}, folder / "model.ckpt")
    small_stable_diffusion(folder / "pipeline")


_BACKBONES = {
    "toy": lambda w, c: Toy(8, mean=0.0, shift=0.2, std=0.3, compute=c),
    "dit_digits": lambda w, c: DiT(DIGITS, None, 8, num_heads=4, compute=c),
    "dit": lambda w, c: DiT(
        str(GOLDEN / "dit_mode_guidance.pt"), str(w / "vae"), 64, num_heads=4, compute=c
    ),
    "ldm": lambda w, c: LDM(str(w / "model.ckpt"), 64, cache=w, compute=c),
    "stable_diffusion": lambda w, c: StableDiffusion(str(w / "pipeline"), 64, 32, compute=c),
}
_SAMPLERS = {"ddpm": DDPM, "ddim": DDIM, "ddim_released": ReleasedDDIM}
_GUIDANCE = {
    "none": NoGuidance,
    "mode": lambda: ModeGuidance(0.1, 0),
    "mode_tangent": lambda: TangentModeGuidance(0.1, 0, tangent_dim=2, tangent_neighbors=3),
}
_SIDES = {"toy": 8, "dit_digits": 8}  # pixels; 64 of the others


@cache
def _backbone(name: str, weights: Path, device: str, precision: str = "float32"):
    """Loaded once in a process."""
    return _BACKBONES[name](weights, Compute(device=device, precision=precision))


def _tree(folder: Path, per_class: int, classes: tuple[str, str] = CLASSES) -> ImageTree:
    """Two classes of noise images, in a folder of their own."""
    root = folder / f"tree-{per_class}"
    for split, count in (("train", per_class), ("val", 2)):
        for label, wnid in enumerate(classes):
            (root / split / wnid).mkdir(parents=True, exist_ok=True)
            for k in range(count):
                image(seed=100 * label + k).save(root / split / wnid / f"{k:03d}.png")
    return ImageTree("noise", None, str(root), 16)


def _digits(device: str, folder: Path, *overrides: str):
    """A composed run on zeros and ones."""
    return composed(
        "dataset=digits", "dataset.classes=[0,1]", f"cache={folder / 'cache'}",
        f"compute.device={device}", "compute.workers=1", *overrides,
    )  # fmt: skip


def _distilling(
    backbone: str, sampler: str, guidance: str, steps: int, ipc: int, device: str, folder: Path,
    precision: str = "float32", marks: bool = True,
) -> Callable[[], Values]:  # fmt: skip
    """Batches of four images; with `marks` each step is one."""
    kind, options = _SAMPLERS[sampler], {}
    if kind is DDPM:
        options = {"variance": "learned" if backbone.startswith("dit") else "fixed"}
    seen: Values = {}

    def on_step(state) -> None:
        if marks:
            counts().mark()
        seen[f"x0_hat {state.step} {state.images[0]}"] = state.x0_hat

    distiller = GenerativeDistiller(
        _backbone(backbone, folder.parent, device, precision),
        kind(steps=steps, cfg_scale=2.0, cfg_channels=3, **options),
        _GUIDANCE[guidance](),
        KMeansModes(),
        Work(cache=folder / "cache", batch_size=4, workers=1, flip="none"),
        on_step=on_step,
    )
    dataset = _tree(folder, 4, ("0", "1") if backbone == "dit_digits" else CLASSES)

    def work() -> Values:
        out = distiller.distill(dataset, ipc, 0, folder / "out", {"method": "m", "config": {}})
        pictures = {f"image {k}": from_pil(made) for k, (made, _) in enumerate(out.images())}
        return seen | pictures

    return work


def sampling(backbone: str, sampler: str, guidance: str, precision: str = "float32") -> Make:
    """A batch of four images, in as many steps as is asked."""

    def make(device: str, steps: int, folder: Path) -> Callable[[], Values]:
        return _distilling(backbone, sampler, guidance, steps, 2, device, folder, precision)

    return make


def decoding(backbone: str) -> Make:
    """Batches of four images: two steps, decoded, checked, written."""

    def make(device: str, batches: int, folder: Path) -> Callable[[], Values]:
        return _distilling(backbone, "ddim", "none", 2, 2 * batches, device, folder, marks=False)

    return make


def encoding(moments: bool) -> Make:
    """Chunks of sixteen images to latents in the cache."""

    def make(device: str, chunks: int, folder: Path) -> Callable[[], Values]:
        dataset = _tree(folder, 16 * chunks)
        codec = _backbone("stable_diffusion", folder.parent, device).codec
        codec.network  # noqa: B018 loaded on first use
        (found, _), info = take_inventory(dataset, "train", 1, folder, 1), dataset.classes[0]
        cache = LatentCache(folder / "latents", codec, "none")

        def work() -> Values:
            if moments:
                return dict(zip(("mean", "std"), cache.moments(info, found), strict=True))
            return {"latents": cache.latents(info, found)}

        return work

    return make


def student(name: str, labels: str, precision: str = "float32", on_host: bool = False) -> Make:
    """One epoch of so many batches, then a test; `on_host`: of a set too large for the device."""

    def make(device: str, batches: int, folder: Path) -> Callable[[], Values]:
        protocol = build_protocol(
            _digits(
                device, folder, f"protocol={labels}", f"protocol.image_size={SIZE}",
                f"compute.training_precision={precision}",
            )
        )  # fmt: skip
        where = pick_device(device)
        if labels.startswith("soft"):
            net = make_student("convnet2_w8", 2, SIZE, seed=1).to(where).eval()
            protocol.teacher = Teacher(name="teacher", source="here", top1=100.0, network=net)
        draw, side = torch.Generator().manual_seed(0), protocol.stored_size
        pixels = torch.randint(256, (batches * BATCH, 3, side, side), generator=draw).byte()
        targets = torch.arange(batches * BATCH) % 2
        test = pixels[:BATCH, :, :SIZE, :SIZE].to(where), targets[:BATCH].to(where)
        pixels, targets = pixels if on_host else pixels.to(where), targets.to(where)
        recipe = replace(protocol.recipe(10, 2, name), epochs=1, batch_size=BATCH, tests=(1,))
        net = make_student(name, 2, SIZE, seed=0).to(where)
        objective = protocol.objective(pixels, None)
        training = StudentTraining(net, recipe, objective, 0, folder / "checkpoint")

        def work() -> Values:
            history = training.fit(pixels, targets, test, lambda history: None)
            return net.state_dict() | {"top-1": torch.tensor(history.top1_last)}

        return work

    return make


def fine_tuning(finetune: str) -> Make:
    """So many steps of eight latents of real digits."""

    def make(device: str, steps: int, folder: Path) -> Callable[[], Values]:
        cfg = _digits(device, folder, f"finetune={finetune}", f"finetune.max_steps={steps}")
        distiller, dataset = build_distiller(cfg), build(cfg, "dataset")

        def work() -> Values:
            (phase,) = distiller.finetune(distiller.backbone, dataset, distiller.work)
            return load_tensors(phase.weights)

        return work

    return make


def from_scratch(precision: str) -> Make:
    """So many steps of a small transformer."""

    def make(device: str, steps: int, folder: Path) -> Callable[[], Values]:
        settings = TrainSettings(
            steps=steps, batch_size=4, lr=1e-3, warmup_steps=2, weight_decay=0.01, ema_decay=0.9,
            label_dropout=0.5, precision=precision, seed=0, checkpoint_steps=1000,
        )  # fmt: skip
        torch.manual_seed(0)
        network = build_network(
            input_size=4, patch_size=2, in_channels=1, hidden_size=16, depth=1, num_heads=2,
            num_classes=3,
        ).to(pick_device(device))  # fmt: skip
        trainer = Trainer(network, settings, folder / "checkpoint", data="d")
        draw = torch.Generator().manual_seed(0)
        latents = torch.randn(12, 1, 4, 4, generator=draw).to(pick_device(device))
        class_ids = (torch.arange(12) % 3).to(pick_device(device))

        def work() -> Values:
            trainer.train(latents, class_ids, lambda trainer: None)
            return trainer.state.average

        return work

    return make


class _Set:
    """A distilled set of noise images."""

    manifest = {"seed": 0}  # noqa: RUF012

    def __init__(self, per_class: int) -> None:
        self.classes, self.per_class = CLASSES, per_class

    def images(self):
        for label in range(2):
            for k in range(self.per_class):
                yield image(seed=500 + 100 * label + k, size=(SIZE, SIZE)), label


def _extractor(device: str, classes: int, inventory) -> StudentExtractor:
    where = pick_device(device)
    net = make_student("convnet2_w8", classes, SIZE, seed=1).to(where).eval()
    return StudentExtractor(net, SIZE, where, 1, inventory)


def set_metrics(device: str, images: int, folder: Path) -> Callable[[], Values]:
    """So many images of each class, beside twenty real ones."""
    inventory = take_inventory(_tree(folder, 20), "train", 1, folder, 1)
    extract = _extractor(device, 2, inventory)

    def work() -> Values:
        real = [extract.real(label) for label in range(2)]
        found = measure(real, features_by_class(_Set(images), extract), neighbors=5)
        scores = {k: v for k, v in vars(found).items() if isinstance(v, float)}
        return {k: torch.tensor(v) for k, v in scores.items()}

    return work


def coverage(device: str, images: int, folder: Path) -> Callable[[], Values]:
    """So many images of each parity, asked of a network with ten hidden modes."""
    dataset = DigitsParity(8)
    inventory = take_inventory(dataset.parts, "train", 1, folder, 1)
    ask = Coverage(dataset, _extractor(device, 10, inventory))

    def work() -> Values:
        found = ask(_Set(images))
        return {"counts": torch.tensor(found.counts), "distance": torch.tensor(found.distance)}

    return work


def subjects() -> list[Subject]:
    """All of them, those that take longest first."""
    return [*_of_sampling(), *_of_images(), *_of_students(), *_of_the_rest()]


def _of_sampling() -> list[Subject]:
    found, what = [], "step of 4 images"
    for backbone in reversed(_BACKBONES):
        side = _SIDES.get(backbone, 64)
        for sampler, guidance in product(_SAMPLERS, _GUIDANCE):
            make, name = sampling(backbone, sampler, guidance), f"{backbone} {sampler} {guidance}"
            found.append(Subject(f"sampling {name}", what, make, 3, 4 * 3 * side**2, backbone))
    half = sampling("dit_digits", "ddpm", "mode", "bfloat16")
    name = "sampling dit_digits ddpm mode bfloat16"
    return [*found, Subject(name, what, half, 3, 4 * 3 * 8 * 8, "dit_digits")]


def _of_images() -> list[Subject]:
    chunks = (("latents", False), ("moments", True))
    return [
        *(
            Subject(f"decoding {b}", "batch of 4 images", decoding(b), 1, 4 * 3 * s * s, b)
            for b, s in (("dit_digits", 8), ("ldm", 64), ("stable_diffusion", 64))
        ),
        *(
            Subject(
                f"encoding {name}", "16 images", encoding(moments), 1, 16 * 3 * 64 * 64, "codec"
            )
            for name, moments in chunks
        ),
    ]


def _of_students() -> list[Subject]:
    kinds = {
        "hard_label": ("convnet3_w8", "resnetap10_w8", "resnet10", "timm/test_resnet"),
        "soft_label": ("convnet3_w8", "resnetap10_w8", "resnet10_bn", "timm/test_resnet"),
        "soft_label_fkd": ("convnet3_w8",),
    }
    pixels, what = BATCH * 3 * SIZE * SIZE, f"batch of {BATCH} images"
    made = {f"{p} {name}": student(name, p) for p, names in kinds.items() for name in names}
    made["hard_label convnet3_w8 bfloat16"] = student("convnet3_w8", "hard_label", "bfloat16")
    made["hard_label convnet3_w8 mapped"] = student("convnet3_w8", "hard_label", on_host=True)
    return [Subject(name, what, make, 2, pixels, name) for name, make in made.items()]


def _of_the_rest() -> list[Subject]:
    tuned = ("plain", "minimax", "self_adaptive_memory")
    scratch, pair = from_scratch("float32"), 2 * 3 * SIZE * SIZE
    return [
        *(
            Subject(f"fine-tuning {n}", "batch of 8 latents", fine_tuning(n), 2, 8 * 3 * 8 * 8, n)
            for n in tuned
        ),
        Subject("from scratch", "batch of 4 latents", scratch, 2, 4 * 3 * 4 * 4, "from scratch"),
        Subject("set metrics", "image of each class", set_metrics, 3, pair, "set metrics"),
        Subject("coverage", "image of each class", coverage, 3, pair, "coverage"),
    ]

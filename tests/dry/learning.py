"""Students, fine-tuning, training from scratch, and measuring what was made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from conftest import image
from support import composed

from dry.generating import CLASSES, tree
from dry.work import Make, Values
from eval.metrics.coverage import Coverage
from eval.metrics.features import StudentExtractor
from eval.metrics.measuring import features_by_class
from eval.metrics.set_metrics import measure
from eval.protocols.recipe import Teacher
from eval.protocols.training import StudentTraining
from eval.students.registry import make_student
from mgd3.backbones.weights.dit_weights import build_network
from mgd3.config.build import build, build_distiller, build_protocol
from mgd3.data.digits import DigitsParity
from mgd3.data.inventory import take_inventory
from mgd3.finetuning.from_scratch import Trainer, TrainSettings
from mgd3.runtime.compute import pick_device
from mgd3.storage.tensors import load_tensors

BATCH, SIZE = 8, 16  # of students' images


def _digits(device: str, folder: Path, *overrides: str):
    """A run on zeros and ones, composed once for all devices and folders."""
    cfg = composed("dataset=digits", "dataset.classes=[0,1]", "compute.workers=1", *overrides)
    cfg.cache, cfg.compute.device = str(folder / "cache"), device
    return cfg


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
    inventory = take_inventory(tree(folder, 20), "train", 1, folder, 1)
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

"""Students: transforms per image in a DataLoader, float32  |  batched on the device.

Hard labels on the papers' students; soft labels with the teacher's pass counted; and what tests
cost beside the training that they interrupt.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from eval.images import student_pixels
from eval.protocols.answers import Answers, SoftTargets, soft_loss
from eval.protocols.augmentation import (
    MEAN,
    STD,
    Augmentation,
    SoftAugmentation,
    draw_strips,
    lighting_shift,
    shuffle_patches,
)
from eval.protocols.hard_label import HardTargets
from eval.protocols.recipe import Cosine, Recipe, Steps
from eval.protocols.training import StudentTraining
from eval.students.registry import make_student
from mgd3.runtime.machine import keep_freed_memory
from scripts.timings.stopwatch import Report, apart, default_device, synchronise

PHOTOGRAPHS, SIZE = 100, 224
SOFT_BATCH = 50  # RDED's at 10 images per class
TEST_IMAGES, BETWEEN_TESTS = 500, 20  # ImageNette at 10 images per class: 2,000 epochs, 100 tests


def photographs() -> list[Image.Image]:
    """224-pixel crops of the two photographs that ship with scikit-learn."""
    from sklearn.datasets import load_sample_images

    draw = np.random.default_rng(0)
    crops = []
    for k in range(PHOTOGRAPHS):
        source = Image.fromarray(load_sample_images().images[k % 2])
        left = int(draw.integers(0, source.width - SIZE))
        top = int(draw.integers(0, source.height - SIZE))
        crops.append(source.crop((left, top, left + SIZE, top + SIZE)))
    return crops


class PerImage(Dataset):
    """The reference's way: the protocol's transforms on one image at a time, on the CPU."""

    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images
        self.transform = transforms.Compose(
            [
                transforms.Resize(SIZE),
                transforms.CenterCrop(SIZE),
                transforms.ToTensor(),
                transforms.RandomResizedCrop(SIZE, scale=(0.5, 1.0), antialias=False),
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(0.4, 0.4, 0.4),
                transforms.Lambda(_add_lighting),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), index % 10


def _add_lighting(image: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return image + lighting_shift(1, 0.1, draw)[0]


def reference_epochs(student: str, device: str, epochs: int) -> float:
    """Seconds per epoch the reference's way, the best of `epochs` after a warm-up."""
    net = make_student(student, 10, SIZE, seed=0).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(PerImage(photographs()), batch_size=64, shuffle=True)

    def epoch() -> None:
        for images, target in loader:
            images, target = images.to(device), target.to(device)
            permutation = torch.randperm(len(images), device=device)
            images[:, :, 50:150, 50:150] = images[permutation, :, 50:150, 50:150]  # CutMix
            logits = net(images)
            loss = 0.8 * F.cross_entropy(logits, target)
            loss = loss + 0.2 * F.cross_entropy(logits, target[permutation])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return _best_epoch(epoch, epochs, torch.device(device))


def our_epochs(
    student: str, device: str, epochs: int, precision: str, compiled: bool = False
) -> float:
    """Seconds per epoch our way, the best of `epochs` after a warm-up, which compiles."""
    training = _training(student, device, epochs, precision, compiled)
    pixels, labels = _on(device)
    return _best_epoch(lambda: training.one_epoch(pixels, labels), epochs, torch.device(device))


def _training(
    student: str, device: str, epochs: int, precision: str, compiled: bool = False
) -> StudentTraining:
    keep_freed_memory()
    recipe = Recipe(
        epochs=epochs + 1,
        batch_size=64,
        optimizer="sgd",
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        decay="all",
        schedule=Steps(milestones=(), gamma=0.2),
        tests=(epochs + 1,),
        precision=precision,
    )
    augmentation = Augmentation(
        crop_scale=(0.5, 1.0),
        crop_ratio=(0.75, 4 / 3),
        flip=0.5,
        jitter=0.4,
        lighting=0.1,
        cutmix=1,
    )
    net = make_student(student, 10, SIZE, seed=0).to(device)
    return StudentTraining(net, recipe, HardTargets(augmentation), 0, Path("unwritten"), compiled)


class RDEDPerImage(PerImage):
    """RDED's transforms on one image at a time."""

    def __init__(self, images: list[Image.Image]) -> None:
        super().__init__(images)
        self.transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Lambda(_shuffled),
                transforms.RandomResizedCrop(SIZE, scale=(0.5, 1.0), antialias=True),
                transforms.RandomHorizontalFlip(),
                transforms.Normalize(MEAN, STD),
            ]
        )


def _shuffled(image: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    return shuffle_patches(image[None], *(draw_strips(1, 2, draw) for _ in range(2)))[0]


def reference_soft_epochs(device: str, epochs: int) -> float:
    """Seconds per epoch of RDED's loop: ResNet-18 teacher and student, every batch seen twice."""
    net, teacher = (make_student("resnet18_bn", 10, SIZE, seed=s).to(device) for s in (0, 1))
    teacher.eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    loader = DataLoader(RDEDPerImage(photographs()), batch_size=SOFT_BATCH, shuffle=True)

    def epoch() -> None:
        for images, _ in loader:
            images = images.to(device)
            permutation = torch.randperm(len(images), device=device)
            images[:, :, 50:150, 50:150] = images[permutation, :, 50:150, 50:150]  # CutMix
            with torch.no_grad():
                answers = teacher(images)
                net(images)
            loss = soft_loss(net(images), answers, 20).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return _best_epoch(epoch, epochs, torch.device(device))


def our_soft_epochs(device: str, epochs: int, precision: str) -> float:
    """The same our way."""
    keep_freed_memory()
    net, teacher = (make_student("resnet18_bn", 10, SIZE, seed=s).to(device) for s in (0, 1))
    recipe = Recipe(
        epochs=epochs + 1,
        batch_size=SOFT_BATCH,
        optimizer="adamw",
        lr=1e-3,
        momentum=0.0,
        weight_decay=0.01,
        decay="weights",
        schedule=Cosine(period=2 * epochs),
        tests=(epochs + 1,),
        precision=precision,
    )
    targets = SoftTargets(
        answers=Answers(teacher.eval(), precision),
        augmentation=SoftAugmentation(
            size=SIZE, patches=2, crop_scale=(0.5, 1.0), flip=0.5, cutmix=1.0
        ),
        temperature=20,
        double_norm_update=True,
        seed=None,
    )
    training = StudentTraining(net, recipe, targets, 0, Path("unwritten"))
    pixels, labels = _on(device)
    return _best_epoch(lambda: training.one_epoch(pixels, labels), epochs, torch.device(device))


def test_pass(student: str, device: str, precision: str) -> float:
    """Seconds of one test on TEST_IMAGES images."""
    training = _training(student, device, 1, precision)
    pixels, labels = _on(device)
    rows = torch.arange(TEST_IMAGES) % len(pixels)
    return _best_epoch(
        lambda: training.accuracy(pixels[rows], labels[rows]), 1, torch.device(device)
    )


def _on(device: str) -> tuple[Tensor, Tensor]:
    pixels = torch.stack([student_pixels(i, SIZE) for i in photographs()]).to(device)
    return pixels, (torch.arange(PHOTOGRAPHS) % 10).to(device)


def _best_epoch(epoch: Callable[[], object], epochs: int, device: torch.device) -> float:
    seconds = []
    for _ in range(epochs + 1):
        start = time.perf_counter()
        epoch()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def main(epochs: int) -> None:
    """A table of seconds per epoch."""
    device = default_device()
    report = Report("measurement", "seconds", "x reference", "peak MiB")
    for student in ("resnetap10", "convnet6"):
        ours = [
            (
                f"{student}, epoch, ours {p}{how}",
                (our_epochs, student, device, epochs, p, bool(how)),
            )
            for p in ("float32", "bfloat16")
            for how in ("", ", compiled")
        ]
        reference = (reference_epochs, student, device, epochs)
        report.compare([(f"{student}, epoch, per-image transforms", reference), *ours])
    soft = [
        (f"soft labels, resnet18_bn, epoch, ours {p}", (our_soft_epochs, device, epochs, p))
        for p in ("float32", "bfloat16")
    ]
    report.compare(
        [
            (
                "soft labels, resnet18_bn, epoch, RDED's loop",
                (reference_soft_epochs, device, epochs),
            ),
            *soft,
        ]
    )
    train, _ = apart(our_epochs, "resnetap10", device, epochs, "float32")
    test, memory = apart(test_pass, "resnetap10", device, "float32")
    share = test / (test + BETWEEN_TESTS * train)
    label = f"resnetap10, a test of {TEST_IMAGES} images after {BETWEEN_TESTS} epochs: {share:.0%}"
    report.add(label, f"{test:.4f}", "", f"{memory:.0f}")
    report.show()

"""Our way against the reference's way, on the same network and images, in one run.

sampling    one image at a time, its conditional and null pair as a batch of two  |  batched
training    transforms per image in a DataLoader, float32                         |  on the device

Every measurement has a process of its own, so that peak memory is its own too. Times are the best
of several repetitions; the ratio is the number to read.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.augment import MEAN, STD, Augmentation, lighting_shift
from eval.students import make_student
from eval.test_images import student_pixels
from eval.training import Recipe, StudentTraining
from mgd3.allocator import keep_freed_memory
from mgd3.backbones.dit import BareDiT, DiT
from mgd3.backbones.dit_weights import build_network
from mgd3.distilled import commit
from mgd3.guidance import ModeGuidance
from mgd3.samplers import DDPM
from mgd3.seeding import ImageNoise

PHOTOGRAPHS, SIZE = 100, 224


def random_dit(device: torch.device) -> BareDiT:
    """A DiT-S/2 with random weights in the latent space of 256-pixel images."""
    torch.manual_seed(0)
    network = build_network(
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=384,
        depth=12,
        num_heads=6,
        num_classes=1000,
    )
    return BareDiT(network.to(device).eval().requires_grad_(False), device)


def sample(backbone: BareDiT | DiT, images: int, batch: int, steps: int) -> float:
    """Seconds per image of guided DDPM sampling in batches."""
    sampler = DDPM(steps=steps, cfg_scale=4.0, cfg_channels=3)
    start = time.perf_counter()
    for first in range(0, images, batch):
        keys = [(str(k % 10), k) for k in range(first, min(first + batch, images))]
        sampler(
            backbone,
            class_ids=torch.tensor([k % 10 for _, k in keys], device=backbone.device),
            guidance=ModeGuidance(scale=0.1, stop_t=steps // 2),
            modes=torch.zeros(len(keys), *backbone.latent_shape, device=backbone.device),
            noise=ImageNoise(0, keys, backbone.latent_shape),
        )
    _synchronise(backbone.device)
    return (time.perf_counter() - start) / images


def sampling(network: str, batch: int, images: int, steps: int, device: str) -> float:
    """Seconds per image; a warm-up of two steps first."""
    if batch > 1:
        keep_freed_memory()  # run.py does; the reference's loop does not
    backbone = (
        random_dit(torch.device(device))
        if network == "DiT-S/2"
        else DiT("mgd3/weights/dit_digits.safetensors", vae=None, image_size=8, device=device)
    )
    sample(backbone, batch, batch, steps=2)
    return sample(backbone, images, batch, steps)


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


def our_epochs(student: str, device: str, epochs: int, precision: str) -> float:
    """Seconds per epoch our way, the best of `epochs` after a warm-up."""
    keep_freed_memory()
    recipe = Recipe(
        epochs=epochs + 1,
        batch_size=64,
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        milestones=(),
        gamma=0.2,
        cutmix_probability=1.0,
        test_every=epochs + 1,
        precision=precision,
    )
    augmentation = Augmentation(
        crop_scale=(0.5, 1.0), crop_ratio=(0.75, 4 / 3), flip=0.5, jitter=0.4, lighting=0.1
    )
    net = make_student(student, 10, SIZE, seed=0).to(device)
    training = StudentTraining(net, recipe, augmentation, 0, Path("never-written"))
    pixels = torch.stack([student_pixels(i, SIZE) for i in photographs()]).to(device)
    labels = (torch.arange(PHOTOGRAPHS) % 10).to(device)
    return _best_epoch(lambda: training.one_epoch(pixels, labels), epochs, torch.device(device))


def _best_epoch(epoch: Callable[[], None], epochs: int, device: torch.device) -> float:
    seconds = []
    for _ in range(epochs + 1):
        start = time.perf_counter()
        epoch()
        _synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _measure(connection, function: Callable[..., float], arguments: tuple) -> None:  # noqa: ANN001
    seconds = function(*arguments)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    connection.send((seconds, memory))


def apart(function: Callable[..., float], *arguments: object) -> tuple[float, float]:
    """(seconds, peak MiB) of a measurement in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} failed; its error is above") from None
    finally:
        process.join()


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", nargs="?", choices=["sampling", "training", "all"], default="all")
    parser.add_argument("--epochs", type=int, default=2, help="timed epochs per measurement")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"
    table = Table(
        title=f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {commit()}"
    )
    for column in ("measurement", "seconds", "x reference", "peak MiB"):
        table.add_column(column, justify="left" if column == "measurement" else "right")

    def add(rows: list[tuple[str, tuple]]) -> None:
        reference = None
        for label, job in rows:
            seconds, memory = apart(*job)
            reference = reference or seconds
            table.add_row(label, f"{seconds:.4f}", f"{reference / seconds:.2f}", f"{memory:.0f}")
        table.add_section()

    if options.what in ("sampling", "all"):
        images, batch = (100, 50) if device == "cpu" else (1000, 500)
        add(
            [
                (
                    "dit_digits, per image, one pair at a time",
                    (sampling, "digits", 1, 10, 50, device),
                ),
                (
                    f"dit_digits, per image, batch {batch}",
                    (sampling, "digits", batch, images, 50, device),
                ),
            ]
        )
        images, steps = (8, 4) if device == "cpu" else (64, 50)
        add(
            [
                (
                    f"DiT-S/2, per image, {steps} steps, one pair at a time",
                    (sampling, "DiT-S/2", 1, 4, steps, device),
                ),
                (
                    f"DiT-S/2, per image, {steps} steps, batch {images}",
                    (sampling, "DiT-S/2", images, images, steps, device),
                ),
            ]
        )
    if options.what in ("training", "all"):
        for student in ("resnetap10", "convnet6"):
            add(
                [
                    (
                        f"{student}, epoch, per-image transforms",
                        (reference_epochs, student, device, options.epochs),
                    ),
                    (
                        f"{student}, epoch, ours float32",
                        (our_epochs, student, device, options.epochs, "float32"),
                    ),
                    (
                        f"{student}, epoch, ours bfloat16",
                        (our_epochs, student, device, options.epochs, "bfloat16"),
                    ),
                ]
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

"""Features of students: what coresets, selections and distribution matching measure with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from eval.images import TestImages, read_pixels, student_pixels
from eval.protocols.augmentation import MEAN, STD, channels, normalise
from eval.protocols.observers import IMAGENET, TORCHVISION, load_observer, torchvision_tensors
from eval.protocols.teachers import FullSetNetwork, FullSetOptions, Place
from eval.protocols.training import top1
from eval.students.dropout import masks_from
from eval.students.registry import find_student, make_student
from mgd3.data.datasets import RealDataset, RealImage
from mgd3.data.inventory import ClassImages
from mgd3.runtime import checks
from mgd3.runtime.compute import training_in
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream
from mgd3.runtime.stages import Stage
from mgd3.storage.checkpoints import read_weights

_BATCH = 64


class StudentFeatures:
    """The input of a classifier, under the test transform, of a network trained on the full set."""

    def __init__(
        self,
        student: str,
        epochs: int,
        seed: int,
        weights: str | None,
        recipe: Mapping[str, Any],
        device: torch.device,
        cache: Path,
        workers: int,
        training_precision: str = "float32",
        compiled: bool = False,
        minimum_top1: float = 0.0,
    ) -> None:
        """`minimum_top1`: percent of the real test images; a network below it is refused."""
        self.minimum_top1 = checks.number("features.minimum_top1", minimum_top1, minimum=0)
        self.device = device
        self.student = FullSetNetwork(
            FullSetOptions(
                key="features",
                student=student,
                epochs=epochs,
                seed=seed,
                weights=weights,
                recipe=recipe,
            ),
            Place(device, cache, workers, training_precision, compiled),
        )

    @property
    def image_size(self) -> int:
        """What the network sees, in pixels."""
        return self.student.image_size

    def stages(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> list[Stage]:
        """Training the student, where the cache has it not."""
        return [self.student.stage(dataset, inventory)]

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> StudentExtractor:
        """The student of these classes, trained on `inventory` now unless the cache has it.

        Raises `UserError` for weights of another network or of other classes, and below
        `minimum_top1`.
        """
        own, place = self.student, self.student.place
        net = own.network(dataset, inventory)
        if own.options.weights is not None or self.minimum_top1:  # classes in an order of theirs
            test = TestImages(dataset, place.cache, place.workers)
            pixels, labels = test.on(own.image_size, place.device)
            right = top1(own.answers(net, pixels, labels, dataset), labels)
            own.refuse_below(right, self.minimum_top1, dataset)
        return StudentExtractor(net, own.image_size, place.device, place.workers, inventory)


class PixelFeatures:
    """Pixels in [0, 1] under the test transform: no network, no training."""

    def __init__(self, image_size: int, workers: int) -> None:
        self.image_size = checks.integer("metrics.image_size", image_size, minimum=1)
        self.workers = workers
        self.inventory: Sequence[ClassImages] = ()

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> PixelFeatures:
        """Itself, knowing the real images."""
        self.inventory = inventory
        return self

    def real(self, label: int) -> Tensor:
        """Pixels (N, 3 H W) of a class's real images, in their order."""
        images = self.inventory[label].images
        pixels = torch.stack(list(read_pixels(images, self.image_size, self.workers)))
        return pixels.flatten(1) / 255

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3 H W), and no logits (B, 0)."""
        pixels = torch.stack([student_pixels(i, self.image_size) for i in images])
        return pixels.flatten(1) / 255, torch.empty(len(images), 0)


@dataclass(frozen=True)
class StudentExtractor:
    """A student's features, and the real images that they are compared with."""

    net: nn.Module
    image_size: int
    device: torch.device
    workers: int
    inventory: Sequence[ClassImages]
    prepared: Callable[[Tensor], Tensor] = normalise  # images in [0, 1] as the network wants them

    def real(self, label: int) -> Tensor:
        """Features (N, D) of a class's real images, in their order."""
        images = self.inventory[label].images
        return self._of(torch.stack(list(read_pixels(images, self.image_size, self.workers))))[0]

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, classes), on the CPU."""
        return self._of(torch.stack([student_pixels(i, self.image_size) for i in images]))

    def observe(self, crops: Tensor) -> Tensor:
        """Logits (B, classes) of crops (B, 3, h, w) in [0, 1], on the CPU.

        What is smaller than the network's images lies in their middle, amid zeros once normalised.
        """
        room = [self.image_size - side for side in (crops.shape[3], crops.shape[2])]
        border = [part for side in room for part in (side // 2, side - side // 2)]
        parts = [F.pad(normalise(p.to(self.device)), border) for p in crops.split(_BATCH)]
        return torch.cat([features_and_logits(self.net, part)[1] for part in parts])

    def _of(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        parts = [self.prepared(part.to(self.device) / 255) for part in pixels.split(_BATCH)]
        features, logits = zip(*(features_and_logits(self.net, p) for p in parts), strict=True)
        return torch.cat(features), torch.cat(logits)


@training_in("float32")
@torch.inference_mode()
def features_and_logits(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a network's last linear layer sees of normalised images (B, 3, H, W), and says: CPU."""
    *_, classifier = (module for module in net.modules() if isinstance(module, nn.Linear))
    seen: list[Tensor] = []
    handle = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = net(images)
    finally:
        handle.remove()
    return seen[0].flatten(1).float().cpu(), logits.float().cpu()


class ImagenetJudge:
    """A network of all of ImageNet's 1000 classes, the dataset's first: CaO2's judge.

    An image is right only where none of the other classes of ImageNet is more probable.
    """

    def __init__(
        self,
        student: str,
        weights: str,
        inputs: str,
        image_size: int,
        device: torch.device,
        workers: int,
    ) -> None:
        """`inputs` «released»: values in [-1, 1] instead of ImageNet's normalisation.

        Raises `UserError` for a weights' file that does not exist.
        """
        self.student, self.weights = student, weights
        self.image_size = checks.integer("features.image_size", image_size, minimum=4)
        self.inputs = checks.choice("features.inputs", inputs, ["normalised", "released"])
        if weights != TORCHVISION and not Path(weights).is_file():
            raise UserError(f"features.weights={weights} does not exist; or torchvision")
        find_student(student, self.image_size)
        self.device, self.workers = device, workers

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> StudentExtractor:
        """The network, whose output `label` is the dataset's class of this label.

        Raises `UserError` for a dataset of other classes, or weights of another network.
        """
        key = f"features.weights={self.weights}"
        net = make_student(self.student, IMAGENET, self.image_size, seed=0).to(self.device)
        if self.weights == TORCHVISION:
            tensors = torchvision_tensors(key, self.student, dataset)
        else:
            tensors, _ = read_weights("features.weights", Path(self.weights))
        load_observer(net, tensors, dataset, key, self.student)
        prepared = normalise if self.inputs == "normalised" else (lambda images: 2 * images - 1)
        return StudentExtractor(
            net.eval(), self.image_size, self.device, self.workers, inventory, prepared
        )


class RandomStudents:
    """Students with fresh weights: many as distribution matching's embeddings, one as features."""

    knows_classes = False

    def __init__(self, student: str, image_size: int, device: torch.device, workers: int) -> None:
        self.student = student
        self.image_size = checks.integer("features.image_size", image_size, minimum=4)
        find_student(student, self.image_size)
        self.device, self.workers = device, workers

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> StudentExtractor:
        """The student of seed 0, untrained; its logits say nothing of the classes."""
        net = make_student(self.student, len(dataset.classes), self.image_size, seed=0)
        net = net.to(self.device).eval()
        return StudentExtractor(net, self.image_size, self.device, self.workers, inventory)

    def read(self, images: Sequence[RealImage]) -> Tensor:
        """Normalised images (N, 3, H, W) under the test transform, on the CPU."""
        pixels = torch.stack(list(read_pixels(images, self.image_size, self.workers)))
        return normalise(pixels / 255)

    def pixels(self, inputs: Tensor) -> Tensor:
        """Normalised images as pixels, (N, 3, H, W) uint8."""
        mean, std = (channels(v, torch.device("cpu")) for v in (MEAN, STD))
        return ((inputs.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    def network(self, seed: int, num_classes: int) -> Callable[[Tensor], Tensor]:
        """Normalised images (B, 3, H, W) to what the classifier would see, (B, D).

        Dropout draws from streams of the seed, another for each call.
        """
        net = make_student(self.student, num_classes, self.image_size, seed).to(self.device)
        net.requires_grad_(False)
        *_, last = ((name, m) for name, m in net.named_modules() if isinstance(m, nn.Linear))
        net.set_submodule(last[0], nn.Identity())
        calls = count()

        def embedded(images: Tensor) -> Tensor:
            with masks_from(stream("embedding", seed, next(calls)).initial_seed(), self.device):
                return cast(Tensor, net(images)).flatten(1)

        return embedded

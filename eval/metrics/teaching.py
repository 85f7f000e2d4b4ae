"""What a few images teach a small student: a cheap check of samples beside real images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from eval.images import student_pixels
from eval.protocols.recipe import EvalProtocol
from eval.protocols.training import top1_after
from eval.students.registry import make_student
from mgd3.data.datasets import RealImage
from mgd3.data.pixels import to_pil
from mgd3.runtime.progress import progress
from mgd3.runtime.seeding import stream

_TESTS = 50  # test images of each class that both students see


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Top-1 in percent of a student after so many samples of each class, and after real images."""

    per_class: int
    samples: float
    real: float
    chance: float

    @property
    def worse(self) -> bool:
        """Do samples teach less than random real images?"""
        return self.samples < self.real

    def sentence(self) -> str:
        """The two numbers, and what to do about them."""
        found = (
            f"a small student learns {self.samples:.0f} % from {self.per_class} samples a class "
            f"and {self.real:.0f} % from as many random real images (chance {self.chance:.0f} %)"
        )
        if self.worse:
            return f"{found}: samples teach less than random real images, train longer"
        return f"{found}: samples teach no less than random real images"


def lesson(
    samples: Tensor,
    real: Sequence[Sequence[RealImage]],
    unseen: Sequence[Sequence[RealImage]],
    protocol: EvalProtocol,
    student: str,
    device: torch.device,
) -> Lesson:
    """One student on samples (C, k, 3, H, W) uint8 by class; another on as many real images.

    `real` are each class's training images, of which k are drawn (all, where there are fewer, and
    as many samples). Both students are tested on `unseen` ones: on the generator's own training
    images samples would do better than they are.
    """
    classes = len(real)
    per_class = min(samples.shape[1], *map(len, real))
    learned = [
        (images[i], label)
        for label, images in enumerate(real)
        for i in torch.randperm(len(images), generator=stream(0, label, "lesson"))[:per_class]
    ]
    tested = [(image, label) for label, images in enumerate(unseen) for image in images[:_TESTS]]
    size = protocol.image_size
    labels = torch.arange(classes).repeat_interleave(per_class).to(device)
    test, scores = _pixels(tested, size, device), []
    recipe = protocol.recipe(per_class, classes, student)
    with progress("teaching two small students", 2 * recipe.epochs, "epochs") as advance:
        for pixels in (
            _seen(map(to_pil, samples[:, :per_class].flatten(0, 1)), size, device),
            _pixels(learned, size, device)[0],
        ):
            net = make_student(student, classes, size, 0).to(device)
            objective = protocol.objective(pixels, None)
            top1 = top1_after(net, recipe, objective, pixels, labels, test, lambda _: advance(1))
            scores.append(top1)
    samples_top1, real_top1 = scores
    return Lesson(per_class=per_class, samples=samples_top1, real=real_top1, chance=100 / classes)


def _pixels(
    images: Sequence[tuple[RealImage, int]], size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pixels (N, 3, size, size) uint8 and labels (N,)."""
    pixels = _seen((image.decode() for image, _ in images), size, device)
    return pixels, torch.tensor([label for _, label in images], device=device)


def _seen(images: Iterable[Image.Image], size: int, device: torch.device) -> Tensor:
    """Images as a student sees them, (N, 3, size, size) uint8."""
    return torch.stack([student_pixels(image, size) for image in images]).to(device)

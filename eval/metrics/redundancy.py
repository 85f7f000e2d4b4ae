"""How much of one increment of a set another already teaches (LGD, Chan-Santiago 2026)."""

from __future__ import annotations

import torch

from eval.images import TestImages, student_pixels, training_images
from eval.protocols.recipe import EvalProtocol
from eval.protocols.training import top1_after
from eval.students.registry import make_student
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.progress import progress


def redundancy(
    first: DistilledDataset,
    second: DistilledDataset,
    protocol: EvalProtocol,
    student: str,
    test: TestImages,
    device: torch.device,
) -> float:
    """Top-1 in percent on the second set's images of a student trained on the first alone.

    High: the second adds little. Two seeds of one method are such increments.
    """
    num_classes = len(first.classes)
    protocol.prepare(test, device)
    pixels, labels = training_images(first, protocol.stored_size, device, test.cache, test.workers)
    size, resized = protocol.image_size, protocol.test_resize
    others = [(student_pixels(i, size, resized), label) for i, label in second.images()]
    theirs = torch.stack([p for p, _ in others]).to(device)
    recipe = protocol.recipe(first.ipc, num_classes, student)
    net = make_student(student, num_classes, size, seed=0).to(device)
    known = theirs, torch.tensor([label for _, label in others], device=device)
    what, objective = f"redundancy of {first.manifest['method']}", protocol.objective(pixels, None)
    with progress(what, recipe.epochs, "epochs") as advance:
        return top1_after(net, recipe, objective, pixels, labels, known, lambda _: advance(1))

"""What cannot be trained, said before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from eval.protocols.recipe import EvalProtocol, Recipe
from eval.students.registry import Factory, find_student
from mgd3.runtime.batching import free_bytes
from mgd3.runtime.errors import UserError

_COPIES = {"sgd": 3, "adamw": 4}  # of each parameter: itself, its gradient, the optimiser's


def require_feasible(
    protocol: EvalProtocol,
    students: Sequence[str],
    ipc: int,
    num_classes: int,
    device: torch.device,
) -> None:
    """`UserError` for one class, for a student that there is not, and for one too large."""
    if students and num_classes < 2:
        raise UserError(
            f"a classifier needs two classes or more to tell apart, and there is {num_classes}; "
            "add classes, or leave students out with students=[]"
        )
    for student in students:
        factory = find_student(student, protocol.image_size)
        recipe = protocol.recipe(ipc, num_classes, student)
        _require_memory(student, factory, num_classes, protocol.image_size, recipe, device)


def _require_memory(
    student: str,
    factory: Factory,
    num_classes: int,
    image_size: int,
    recipe: Recipe,
    device: torch.device,
) -> None:
    """The least that a training takes: parameters and what goes with them, and one batch."""
    with torch.device("meta"):  # shapes without memory
        parameters = sum(p.numel() for p in factory(num_classes).parameters())
    copies = _COPIES.get(recipe.optimizer, 3)
    least = 4 * (copies * parameters + recipe.batch_size * 3 * image_size**2)
    free = free_bytes(device)
    if least > free:
        raise UserError(
            f"students: {student} at {image_size} px has {parameters:,} parameters: with gradients "
            f"and a batch of {recipe.batch_size} it takes {least / 1e9:,.1f} GB or more, and "
            f"{free / 1e9:,.1f} GB are free on {device}; take a smaller student, size or batch"
        )

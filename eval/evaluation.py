"""Evaluation of one distilled dataset: every student and seed, one result row each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from eval.results import EvalResult, ResultStore
from eval.test_images import TestImages
from eval.tracking import Run
from eval.training import History
from mgd3.distilled import DistilledDataset, commit
from mgd3.progress import progress


class EvalProtocol(Protocol):
    """Trains and tests one student."""

    name: str
    image_size: int

    def epochs(self, ipc: int, num_classes: int) -> int:
        """Epochs of one student."""

    def evaluate(self, distilled: DistilledDataset, test: TestImages, **student: Any) -> History:
        """Train one student from scratch and test it."""


@dataclass(frozen=True)
class RunIds:
    """Identities that every result row carries."""

    run: str
    cell: str  # without the seeds


def evaluate_students(
    distilled: DistilledDataset,
    test: TestImages,
    protocol: EvalProtocol,
    students: Sequence[tuple[str, int]],
    store: ResultStore,
    ids: RunIds,
    tracker: Run,
    device: torch.device,
) -> None:
    """Train and test each (student, seed), one after another; append its row to `store`."""
    manifest = distilled.manifest
    epochs = protocol.epochs(distilled.ipc, len(distilled.classes))
    for student, seed in students:
        with progress(f"training {student}, seed {seed}", epochs) as advance:
            on_epoch = _observer(f"{student}/seed{seed}/top1", advance, tracker)
            checkpoint = f".{student.replace('/', '-')}-{seed}.checkpoint"
            history = protocol.evaluate(
                distilled,
                test,
                student=student,
                student_seed=seed,
                checkpoint=store.path.parent / checkpoint,
                device=device,
                on_epoch=on_epoch,
            )
        store.append(
            EvalResult(
                dataset=manifest["dataset"],
                ipc=distilled.ipc,
                method=manifest["method"],
                protocol=protocol.name,
                student=student,
                distill_seed=manifest["seed"],
                student_seed=seed,
                top1_last=history.top1_last,
                top1_best=history.top1_best,
                tests=len(history.tested),
                test_images=len(test.on(protocol.image_size, device)[1]),
                epochs=epochs,
                train_seconds=round(history.train_seconds, 2),
                test_seconds=round(history.test_seconds, 2),
                run_id=ids.run,
                cell_id=ids.cell,
                commit=commit(),
                dataset_note=manifest["dataset_note"],
            )
        )


def _observer(key: str, advance: Callable[..., None], tracker: Run) -> Callable[[History], None]:
    """Moves the bar after every epoch, and records a test when there was one."""

    def on_epoch(history: History) -> None:
        if not history.tested:
            advance(1)
            return
        epoch, top1 = history.tested[-1]
        advance(1, note=f"top-1 {top1:.1f} %")
        if history.just_tested:
            tracker.log({"epoch": epoch, key: top1})

    return on_epoch

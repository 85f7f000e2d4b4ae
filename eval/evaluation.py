"""Evaluation of one distilled dataset: every student and seed, one result row each."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product
from typing import Any, Protocol

import torch

from eval.results import EvalResult, ResultStore
from eval.test_images import TestImages
from eval.tracking import Run
from eval.training import History
from mgd3.distilled import DistilledDataset, commit
from mgd3.progress import progress

log = logging.getLogger(__name__)


class EvalProtocol(Protocol):
    """Trains and tests one student."""

    name: str
    image_size: int

    def epochs(self, ipc: int, num_classes: int) -> int:
        """Epochs of one student."""

    def evaluate(self, distilled: DistilledDataset, test: TestImages, **student: Any) -> History:
        """Train one student from scratch and test it."""


def evaluate_students(
    distilled: DistilledDataset,
    test: TestImages,
    protocol: EvalProtocol,
    students: Sequence[str],
    student_seeds: int,
    store: ResultStore,
    run_id: str,
    tracker: Run,
    device: torch.device,
) -> None:
    """Append a row for every student and seed that `store` does not hold yet."""
    manifest = distilled.manifest
    epochs = protocol.epochs(distilled.ipc, len(distilled.classes))
    for student, seed in product(students, range(student_seeds)):
        if store.has(student, seed):
            log.info("already trained: %s, seed %d", student, seed)
            continue
        with progress(f"training {student}, seed {seed}", epochs) as advance:

            def on_epoch(history: History) -> None:
                tested = history.tested[-1] if history.tested else None
                advance(1, note=f"top-1 {tested[1]:.1f} %" if tested else "")

            history = protocol.evaluate(
                distilled,
                test,
                student=student,
                student_seed=seed,
                checkpoint=store.path.parent / f".{_file_name(student)}-{seed}.checkpoint",
                device=device,
                on_epoch=on_epoch,
            )
        for epoch, top1 in history.tested:
            tracker.log({"epoch": epoch, f"{student}/seed{seed}/top1": top1})
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
                run_id=run_id,
                commit=commit(),
                dataset_note=manifest["dataset_note"],
            )
        )


def _file_name(student: str) -> str:
    return student.replace("/", "-")

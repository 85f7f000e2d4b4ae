"""Evaluation of one distilled dataset: every student and seed, one result row each."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from eval.images import TestImages, training_images
from eval.protocols.recipe import EvalProtocol, Teacher
from eval.protocols.training import History, StudentTraining
from eval.protocols.trial import TrainingCost
from eval.reports.run_report import write_summary
from eval.reports.samples import image_strips
from eval.results.rows import EvalResult, ResultStore
from eval.results.tables import layout, markdown
from eval.students.registry import make_student, synchronised
from eval.tracking import Run, keep
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime import checks
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.machine import commit, library_versions, machine_name
from mgd3.runtime.progress import progress
from mgd3.runtime.stages import Stage, announce
from mgd3.storage.files import write_atomic

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Where and how students run; none of it changes a result by more than rounding."""

    device: torch.device
    channels_last: bool = False  # memory layout of convolutions
    compile: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    parallel: str = "students"  # what processes share: the students, or each student's «batches»

    def __post_init__(self) -> None:
        checks.choice("compute.parallel", self.parallel, ["students", "batches"])

    @property
    def trainers(self) -> Ranks:
        """The processes that train one student together."""
        return self.ranks if self.parallel == "batches" else Ranks()

    def share(self, students: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
        """Those of the students that this process has a part in."""
        alone = self.parallel == "students"
        return [s for i, s in enumerate(students) if not alone or self.ranks.mine(i)]


@dataclass(frozen=True)
class RunIds:
    """Identities that every result row carries."""

    run: str
    cell: str  # without the seeds
    train: str | None  # digest of the real training images that the set was made from
    val: str  # and of the real test images


def missing_rows(
    folder: Path, students: Sequence[tuple[str, int]], run: str | None = None
) -> list[tuple[str, int]]:
    """Those (student, seed) that `folder` (of `run`) holds no row of."""
    store = ResultStore(folder / "results.jsonl", run)
    return [(student, seed) for student, seed in students if not store.has(student, seed)]


def score(
    distilled: DistilledDataset,
    test: TestImages,
    protocol: EvalProtocol,
    students: Sequence[tuple[str, int]],
    folder: Path,
    ids: RunIds,
    start: Callable[[], Run],
    execution: Execution,
) -> list[EvalResult]:
    """Rows of one set in `folder`: those that are there, and those of the missing (student, seed).

    `start` begins a tracker's record, if there is anything to train.
    """
    store, ranks = ResultStore(folder / "results.jsonl", ids.run), execution.ranks
    pending = missing_rows(folder, students, ids.run)
    if pending and (others := {r.commit for r in store.rows()} - {commit()}):
        log.warning("%s also holds rows of %s: the table will say so", folder, ", ".join(others))
    ranks.wait()  # all have read what is there
    of_its_own = execution.parallel == "students" and bool(execution.share(pending))
    if pending and not (ranks.first or of_its_own):
        evaluate_students(distilled, test, protocol, pending, store, ids, None, execution)
        ranks.wait()
    elif pending:
        with start() as record:
            evaluate_students(distilled, test, protocol, pending, store, ids, record, execution)
            ranks.wait()
            if ranks.first:
                if distilled.generated or getattr(record, "real_images", False):
                    record.log_images("distilled", image_strips(distilled))
                    files, metadata = distilled.files(), distilled.origin | {"scored_by": ids.run}
                    keep(record, distilled.label, "dataset", files, metadata)
                table = layout(store.rows())
                record.log_table(f"accuracy: {table.title}", table.headers, table.texts())
    ranks.wait()
    rows = store.rows()
    if not ranks.first:
        return rows
    for row in rows:  # of a run that was killed between a row and this
        _checkpoint(folder, row.student, row.student_seed).unlink(missing_ok=True)
    write_summary(folder / "summary.json", rows)
    write_atomic(folder / "table.md", markdown(rows).encode())
    return rows


def evaluate_students(
    distilled: DistilledDataset,
    test: TestImages,
    protocol: EvalProtocol,
    students: Sequence[tuple[str, int]],
    store: ResultStore,
    ids: RunIds,
    tracker: Run | None,
    execution: Execution,
) -> None:
    """Train and test this process's share of (student, seed); append each one's row to `store`.

    `tracker` None is for a process that another one writes for.
    """
    ranks, device = execution.trainers, execution.device
    num_classes = len(distilled.classes)
    teacher = execution.ranks.in_turn(lambda: protocol.prepare(test, device))
    shared = _of_every_row(distilled, test, protocol, ids, teacher)
    pixels, labels = training_images(
        distilled, protocol.stored_size, device, test.cache, test.workers
    )
    real = test.on(protocol.image_size, device, protocol.test_resize)
    weights = None
    if protocol.image_weights == "mass":
        weights = torch.tensor(distilled.mass_weights(), device=device)
    objective, mine = protocol.objective(pixels, weights), execution.share(students)
    sizes = distilled.ipc, num_classes, len(labels)
    announce(students_stage(protocol, mine, *sizes, test, execution))
    for student, seed in mine:
        checkpoint = _checkpoint(store.path.parent, student, seed)
        recipe = protocol.recipe(distilled.ipc, num_classes, student)
        net = make_student(student, num_classes, protocol.image_size, seed).to(device)
        if execution.channels_last:
            net = net.to(memory_format=torch.channels_last)
        training = StudentTraining(
            synchronised(net, ranks),
            recipe,
            objective,
            seed,
            checkpoint,
            execution.compile,
            ranks,
        )
        cost = _cost(protocol, student, *sizes, test, execution)
        what = f"training {student}, seed {seed}"
        done, compiles = training.epoch, execution.compile
        with progress(
            what, recipe.epochs, "epochs", done, pace=cost.pace, compiles=compiles
        ) as advance:
            on_epoch = _observer(f"{student}/seed{seed}/top1", advance, tracker)
            history = training.fit(pixels, labels, real, on_epoch)
        if not ranks.first:
            continue
        store.append(
            EvalResult(
                student=student,
                student_seed=seed,
                top1_last=history.top1_last,
                top1_best=history.top1_best,
                tests=len(history.tested),
                test_images=len(real[1]),
                epochs=recipe.epochs,
                train_seconds=round(history.train_seconds, 2),
                test_seconds=round(history.test_seconds, 2),
                machine=machine_name(device, ranks.world),
                device=device.type,
                threads=torch.get_num_threads(),
                deterministic=torch.are_deterministic_algorithms_enabled(),
                compiled=execution.compile,
                channels_last=execution.channels_last,
                versions=library_versions(),
                **shared,
            )
        )
        checkpoint.unlink(missing_ok=True)  # only now: the row is on disk


def students_stage(
    protocol: EvalProtocol,
    students: Sequence[tuple[str, int]],
    ipc: int,
    num_classes: int,
    images: int,
    test: TestImages,
    execution: Execution,
) -> Stage:
    """Training these (student, seed) one after another on a set of so many images."""
    seconds, guesses, epochs = 0.0, set(), set()
    for student, count in Counter(student for student, _ in students).items():
        cost = _cost(protocol, student, ipc, num_classes, images, test, execution)
        spent, guess = cost.seconds(cost.recipe.epochs)
        seconds += count * spent
        guesses.add(guess)
        epochs.add(cost.recipe.epochs)
    names = ", ".join(dict.fromkeys(student for student, _ in students))
    many = f"{len(students)} students" if len(students) != 1 else "a student"
    return Stage(
        what=f"trains {many} ({names}) on {images:,} images for "
        f"{' or '.join(f'{n:,}' for n in sorted(epochs))} epochs",
        seconds=seconds,
        guess="; ".join(sorted(guesses - {""})),
        shorter="students=[…], student_seeds=… or protocol=…",
        there=not students,
    )


def _cost(
    protocol: EvalProtocol,
    student: str,
    ipc: int,
    num_classes: int,
    images: int,
    test: TestImages,
    execution: Execution,
) -> TrainingCost:
    return TrainingCost(
        student=student,
        protocol=protocol,
        recipe=protocol.recipe(ipc, num_classes, student),
        images=images,
        num_classes=num_classes,
        cache=test.cache,
        device=execution.device,
        compiled=execution.compile,
    )


def _checkpoint(folder: Path, student: str, seed: int) -> Path:
    """Where a student that is being trained is kept."""
    return folder / f".{student.replace('/', '-')}-{seed}.checkpoint"


def _of_every_row(
    distilled: DistilledDataset,
    test: TestImages,
    protocol: EvalProtocol,
    ids: RunIds,
    teacher: Teacher | None,
) -> dict[str, Any]:
    """What the rows of one set under one protocol share."""
    manifest = distilled.manifest
    return {
        "dataset": manifest["dataset"],
        "ipc": distilled.ipc,
        "method": manifest["method"],
        "protocol": protocol.name,
        "distill_seed": manifest["seed"],
        "run_id": ids.run,
        "cell_id": ids.cell,
        "commit": commit(),
        "dataset_note": test.dataset.note or manifest["dataset_note"],
        "teacher": teacher.name if teacher else None,
        "teacher_source": teacher.source if teacher else None,
        "teacher_top1": teacher.top1 if teacher else None,
        "role": manifest.get("role"),
        "labels": protocol.labels,
        "augmented": protocol.augmented,
        "train_data": ids.train,
        "test_data": ids.val,
    }


def _observer(
    key: str, advance: Callable[..., None], tracker: Run | None
) -> Callable[[History], None]:
    """Moves the bar after every epoch, and records a test when there was one."""

    def on_epoch(history: History) -> None:
        if not history.tested:
            advance(1)
            return
        epoch, top1 = history.tested[-1]
        advance(1, note=f"top-1 {top1:.1f} %")
        if tracker and history.just_tested:
            tracker.log({"epoch": epoch, key: top1})

    return on_epoch

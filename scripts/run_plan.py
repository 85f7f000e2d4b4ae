"""What one run would do, stage by stage, with what is there and what it takes; does nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from eval.images import TestImages
from eval.scoring import missing_rows, students_stage
from mgd3.config import identity
from mgd3.config.fetching import needed, out_of_reach
from mgd3.config.run_folder import refuse_foreign
from mgd3.config.schema import student_seeds
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import ClassImages, looking
from mgd3.runtime.errors import UserError
from mgd3.runtime.stages import Stage, duration, total_seconds
from mgd3.storage.files import remove_empty
from scripts.run_cell import Cell, checked


def print_plan(cfg: DictConfig, one: bool) -> None:
    """A line per stage; of a sweep's run, which is not the `one`, a line in all."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    try:
        refuse_foreign(folder, claims=True)
        lacking = out_of_reach(cfg)
        stages = list(stages_of(cfg, folder, able=not lacking))
    finally:
        remove_empty(folder)
    seconds, unknown = total_seconds(stages)
    to_do = sum(not stage.there for stage in stages)
    in_all = _in_all(seconds, unknown) if to_do else "nothing to do"
    if not one:
        lacks = "".join(f"; lacks {error}" for error in lacking) if to_do else ""
        print(f"{folder}: {in_all}{lacks}")
        return
    print(folder)
    for stage in stages:
        print(f"  {'there' if stage.there else 'to do'}  {stage}")
    for error in lacking if to_do else []:
        print(f"  lacks  {error}")
    print(f"  {to_do} of {len(stages)} stages to do: {in_all}")


def _in_all(seconds: float, unknown: bool) -> str:
    """How long all stages take, as far as known."""
    if unknown and duration(seconds) == duration(0):
        return "never timed on this machine"
    return f"about {duration(seconds)} here" + (", and what was never timed" if unknown else "")


def stages_of(cfg: DictConfig, run_dir: Path, able: bool = True) -> Iterator[Stage]:
    """Every stage of a run whose scores belong into `run_dir`, in their order.

    Not `able`: the backbone's weights cannot be had, so its own stages are one.
    """
    needs = needed(cfg)
    yield from (Stage(what=f"fetches {need}") for need in needs)
    if "download" in cfg.dataset:
        cfg.dataset.download = False
    try:
        cell = checked(cfg, run_dir, fetching=False)
    except UserError:
        if not any(need.key == "dataset" for need in needs):
            raise
        yield Stage(what="the rest is known once the real images are there")
        return
    dataset = cell.dataset
    trained_on = identity.set_reads_train(cfg) or identity.protocol_reads_train(cfg)
    stage, _ = looking(dataset, "val", Path(cfg.cache))
    yield stage
    inventory: list[ClassImages] = []
    if trained_on:
        stage, inventory = looking(dataset, "train", Path(cfg.cache))
        yield stage
    wanted = list(product(cell.students, student_seeds(cfg)))
    missing = missing_rows(run_dir, wanted, cell.run_id)
    teacher: Any = getattr(cell.protocol, "stages", None)
    if teacher and missing:
        yield from teacher(dataset, inventory)
    distilled = DistilledDataset(cell.out)
    if distilled.complete:
        images = len(distilled.manifest["images"])
        yield Stage(what=f"the distilled set, {images:,} images", there=True)
    else:
        yield from _making(cell, inventory, able and not needs)
    if len(wanted) > len(missing):
        what = f"{len(wanted) - len(missing)} of {len(wanted)} students are trained"
        yield Stage(what=what, there=True)
    if missing:
        ipc, images = _sizes(cell, inventory)
        if distilled.complete:
            ipc, images = distilled.ipc, len(distilled.manifest["images"])
        test = TestImages(dataset, Path(cfg.cache), cfg.compute.workers)
        classes = len(dataset.classes)
        yield students_stage(cell.protocol, missing, ipc, classes, images, test, cell.execution)


def _making(cell: Cell, inventory: Sequence[ClassImages], able: bool) -> Iterator[Stage]:
    """The making of the set, as far as the parts that are here can tell."""
    stages: Any = getattr(cell.distiller, "stages", None)
    if stages is None or not able:
        _, images = _sizes(cell, inventory)
        yield Stage(what=f"makes {images:,} images by {cell.cfg.method.name}")
        return
    yield from stages(cell.dataset, cell.cfg.ipc, cell.out, inventory)


def _sizes(cell: Cell, inventory: Sequence[ClassImages]) -> tuple[int, int]:
    """Images per class, and in all, of the set that is made."""
    per_class: Any = getattr(cell.distiller, "per_class", None)
    classes = len(cell.dataset.classes)
    counts = per_class(inventory) if per_class else [cell.cfg.ipc] * classes
    return max(counts), sum(counts)

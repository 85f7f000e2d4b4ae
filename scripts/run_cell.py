"""One cell of a table: distil a set unless it is there, score it by every student asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from eval.images import TestImages
from eval.protocols.feasibility import require_feasible
from eval.results.rows import EvalResult
from eval.scoring import Execution, RunIds, missing_rows, score
from eval.students.registry import expand_students, find_student
from mgd3.config import identity
from mgd3.config.build import (
    build,
    build_distiller,
    build_execution,
    build_protocol,
    shares_work,
)
from mgd3.config.fetching import announce, fetch, out_of_reach
from mgd3.config.run_folder import begun, record
from mgd3.config.schema import choices, plain, student_names, student_seeds
from mgd3.data.claims import OF_SCORES, OF_SET, claim, earlier_folders
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import MANIFEST, DistilledDataset, forget_journal
from mgd3.data.inventory import SplitContent, contents_of, require_images, take_inventory
from mgd3.distillers.parts import Distiller, least_real, refuse_captions, refuse_classes
from mgd3.runtime.compute import pick_device
from mgd3.runtime.distributed import Ranks, join
from mgd3.runtime.machine import machine_name
from mgd3.storage.digests import content_digests
from mgd3.storage.files import exclusive, refuse_links, remove_leftovers, waiting

log = logging.getLogger(__name__)

_REMEDY = "choose another hydra.run.dir or leave it out, or delete that folder"
_REMEDY_OF_DATA = "name the new data apart with dataset.name=NAME, or delete that folder"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What a run is made of, checked before any work."""

    cfg: DictConfig
    run_dir: Path  # of the scores
    out: Path  # of the distilled set, one level up, where every protocol finds it
    dataset: RealDataset
    protocol: Any
    students: list[str]
    distiller: Distiller
    execution: Execution
    tracker: Any

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What makes the scores: the set's identity and the protocol's."""
        chosen = choices(self.cfg)
        return identity.set_identity(self.cfg, chosen) | identity.score_identity(self.cfg, chosen)

    @property
    def run_id(self) -> str:
        """What every row of this run carries."""
        return identity.digest(self.identity)

    @property
    def ranks(self) -> Ranks:
        """The processes of this run."""
        return self.execution.ranks


def run_cell(cfg: DictConfig, show: bool) -> None:
    """Distil, evaluate; each stage skips what its folder holds. `show` prints the table."""
    with begun(cfg, claims=True) as run_dir:
        cell = checked(cfg, run_dir)
    if cell.dataset.note:
        log.warning("dataset=%s: %s", cell.dataset.name, cell.dataset.note)
    _say_what_was_chosen(cfg)
    test = TestImages(cell.dataset, Path(cfg.cache), cfg.compute.workers)
    ranks = cell.ranks
    # Two sweeps may meet in a set that both train students on: the second waits for the first.
    with exclusive(run_dir, patient=not show) if ranks.first else nullcontext():
        if ranks.first:
            refuse_links(cell.out)
            remove_leftovers(run_dir)
        ranks.wait()
        contents = ranks.in_turn(lambda: _contents(cell))
        if not DistilledDataset(cell.out).complete:
            ranks.in_turn(lambda: _refuse_captions(cell))
        if ranks.first:
            _claim(cell, contents)
            record(run_dir, cfg)
        ranks.wait()
        wanted = list(product(cell.students, student_seeds(cfg)))
        if missing_rows(
            run_dir, wanted, cell.run_id
        ):  # refuse a teacher before hours of sampling, not after
            ranks.in_turn(lambda: cell.protocol.prepare(test, cell.execution.device))
        distilled = _distil(cell, contents)
        log.info("distilled dataset: %s", cell.out)
        if wanted:
            _score(cell, distilled, test, contents, wanted, show)
    log.info("results: %s", run_dir)


def checked(cfg: DictConfig, run_dir: Path, fetching: bool = True) -> Cell:
    """Build every part, once what is missing is fetched; `UserError` for a wrong value in any.

    Without `fetching`, weights that are missing are so later, where they are read.
    """
    ranks, device = join(pick_device(cfg.compute.device))  # which GPU is this process's
    protocol, students = build_protocol(cfg), expand_students(student_names(cfg))
    for student in students:  # a wrong name is refused before networks are loaded
        find_student(student, protocol.image_size)
    distiller = build_distiller(cfg, ranks)  # a wrong value is refused before hours of fetching
    needs = announce(cfg) if fetching and ranks.first else []
    dataset = build(cfg, "dataset")  # fetches its own; refused, nothing else is fetched
    require_images(dataset, least_real(distiller, cfg.ipc), max(1, least_real(distiller, 1)))
    refuse_classes(distiller, dataset)
    inside = run_dir.parent.name == Path(cfg.folder).name
    out = run_dir.parent if inside else run_dir
    if fetching and not DistilledDataset(out).complete:
        for error in out_of_reach(cfg):  # before weights are fetched, or a folder is claimed
            raise error
    fetch(needs)
    ranks.wait()
    require_feasible(protocol, students, cfg.ipc, len(dataset.classes), device)
    return Cell(
        cfg=cfg,
        run_dir=run_dir,
        out=out,
        dataset=dataset,
        protocol=protocol,
        students=students,
        distiller=distiller,
        execution=Execution(device=device, ranks=ranks, **build_execution(cfg)),
        tracker=build(cfg, "tracker"),
    )


def _say_what_was_chosen(cfg: DictConfig) -> None:
    """What goes with the dataset without having been asked for, and folders of earlier versions."""
    asked = {o.split("=")[0].lstrip("+") for o in HydraConfig.get().overrides.task}
    taken = [
        f"{group}={choices(cfg)[group]}"
        for group in ("backbone", "protocol", "compute")
        if group not in asked and (group != "backbone" or group in identity.reads(cfg))
    ]
    if taken:
        log.info("%s: %s unless told otherwise", cfg.dataset.name, ", ".join(taken))
    old = earlier_folders(Path(cfg.runs), str(cfg.dataset.name), str(cfg.method.name))
    if old:
        log.warning(
            "%d sets such as %s were made by an earlier version of this project; they are left "
            "alone and not used",
            *(len(old), old[0]),
        )


def _refuse_captions(cell: Cell) -> None:
    """`UserError` before the folder is claimed, or a corrected file would be another one."""
    cache, workers = Path(cell.cfg.cache), cell.cfg.compute.workers
    refuse_captions(
        cell.distiller,
        cell.dataset,
        lambda: take_inventory(cell.dataset, "train", 1, cache, workers),
    )


def _contents(cell: Cell) -> dict[str, SplitContent]:
    """What the real images are, by split."""
    cfg = cell.cfg
    trained_on = identity.set_reads_train(cfg) or identity.protocol_reads_train(cfg)
    splits = ["val", *(["train"] if trained_on else [])]
    return contents_of(cell.dataset, splits, Path(cfg.cache), cfg.compute.workers)


def _claim(cell: Cell, contents: Mapping[str, SplitContent]) -> None:
    """Both folders say what they were made from, or refuse to be another run's."""
    cfg, cache = cell.cfg, Path(cell.cfg.cache)
    names = {info.wnid: info.name for info in cell.dataset.classes}  # classes.csv makes prompts
    train = {"train": contents["train"]} if "train" in contents else {}
    with waiting(cell.out):
        claim(
            cell.out / OF_SET,
            identity.set_identity(cfg, choices(cfg)),
            train if identity.set_reads_train(cfg) else {},
            cache,
            _REMEDY if cell.out == cell.run_dir else _REMEDY_OF_DATA,
            classes=names,
            files=content_digests(identity.set_files(cfg), cache),
        )
    if cell.students:
        claim(
            cell.run_dir / OF_SCORES,
            identity.score_identity(cfg, choices(cfg)),
            {"val": contents["val"], **(train if identity.protocol_reads_train(cfg) else {})},
            cache,
            _REMEDY if cell.out == cell.run_dir else _REMEDY_OF_DATA,
            files=content_digests(identity.score_files(cfg), cache),
        )


def _distil(cell: Cell, contents: Mapping[str, SplitContent]) -> DistilledDataset:
    """The finished distilled dataset, made now if it is not there."""
    cfg, out, ranks = cell.cfg, cell.out, cell.ranks
    distilled = DistilledDataset(out)
    with waiting(out) if ranks.first else nullcontext():
        if ranks.first:
            remove_leftovers(out)
        complete = ranks.first and distilled.complete
        if complete:
            distilled.verify(Path(cfg.cache), cfg.compute.workers)
            forget_journal(out)
        done = ranks.agreed(complete, torch.device("cpu"))
        if done or not (ranks.first or shares_work(cell.distiller)):
            ranks.wait()
            return distilled
        provenance = _provenance(cell, contents)
        distilled = cell.distiller.distill(cell.dataset, cfg.ipc, cfg.seed, out, provenance)
        ranks.wait()
        return distilled


def _provenance(cell: Cell, contents: Mapping[str, SplitContent]) -> dict[str, Any]:
    """What the manifest says of how the images were made."""
    cfg = cell.cfg
    made_from = identity.set_identity(cfg, choices(cfg))
    for_set = identity.set_reads_train(cfg)
    found = {
        "method": cfg.method.name,
        "role": cfg.method.get("role"),
        "machine": machine_name(pick_device(cfg.compute.device), cell.ranks.world),
        "identity": made_from,
        "config": identity.values_for_people(cfg, made_from),
        "data": {
            "train": contents["train"].digest if for_set else None,
            "val": contents["val"].digest,
        },
    }
    return found if "seed" in made_from else found | {"seed": None}


def _score(
    cell: Cell,
    distilled: DistilledDataset,
    test: TestImages,
    contents: Mapping[str, SplitContent],
    wanted: list[tuple[str, int]],
    show: bool,
) -> None:
    """Train what is missing; write the report and print the table where that is asked for."""
    from eval.results.tables import terminal

    cfg, run_dir = cell.cfg, cell.run_dir
    data = {"train": distilled.manifest["data"]["train"], "val": contents["val"].digest}
    ids = RunIds(run=cell.run_id, cell=identity.cell_id(cell.identity, data), **data)
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    group = experiment or f"{cell.dataset.name}-ipc{cfg.ipc}"
    named, records = cell.ranks.named(cell.run_id), Path(cfg.runs)
    start = partial(cell.tracker.start, named, group, plain(cfg), records)
    rows = score(distilled, test, cell.protocol, wanted, run_dir, ids, start, cell.execution)
    if not cell.ranks.first:
        return
    report = run_dir / "report.html"
    if (show if cfg.report is None else cfg.report) and _is_older(report, distilled, run_dir):
        from eval.reports.run_report import write_report  # takes seconds, as does the map

        log.info("writing %s", report)
        title = f"{cell.dataset.name}, {cfg.ipc} images per class, {cfg.method.name}"
        planes = Path(cfg.cache, "planes")
        write_report(report, rows, [distilled], cell.dataset, title, keep=planes)
    if show:
        Console().print(terminal(rows))
    for row in rows:
        log.info(
            "%s, ipc %d, %s, %s: top1_last %.1f, top1_best %.1f",
            *(row.dataset, row.ipc, f"{row.method}, {row.student}"),
            *(_seeds_of(row), row.top1_last, row.top1_best),
        )


def _seeds_of(row: EvalResult) -> str:
    """The set's seed and the student's; a method that draws nothing has none."""
    if row.distill_seed is None:
        return f"student seed {row.student_seed}"
    return f"seeds {row.distill_seed}/{row.student_seed}"


def _is_older(report: Path, distilled: DistilledDataset, run_dir: Path) -> bool:
    """Is there no report, or one of before the last row or set?"""
    if not report.is_file():
        return True
    of = (run_dir / "results.jsonl", distilled.folder / MANIFEST)
    return report.stat().st_mtime_ns < max(path.stat().st_mtime_ns for path in of)

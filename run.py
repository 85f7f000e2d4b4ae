"""Distil one dataset at one IPC, train students on it from scratch, report their accuracy.

python run.py dataset=imagenette ipc=10        the paper's setting
python run.py                                  embedded digits, on any machine
"""

from __future__ import annotations

import logging
import traceback
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from eval.evaluate import Execution, RunIds, missing_rows, score
from eval.images import TestImages
from eval.reports.run_report import write_report
from eval.results.tables import terminal
from eval.students.registry import expand_students, find_student
from mgd3.config.build import build, build_distiller, build_protocol, claim_folder, shares_work
from mgd3.config.schema import (
    CELL_KEYS,
    CONFIGS,
    DISTILLATION_KEYS,
    EVALUATION_KEYS,
    errors_for_people,
    identity,
    part_of_identity,
    plain,
    register,
    student_names,
    student_seeds,
    validate,
)
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.distillers.parts import Distiller
from mgd3.runtime.compute import pick_device
from mgd3.runtime.distributed import Ranks, join
from mgd3.runtime.errors import UserError
from mgd3.runtime.files import exclusive, nothing_left_behind, remove_leftovers, waiting
from mgd3.runtime.machine import keep_freed_memory, machine_name

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """Build the parts, distil, evaluate; every stage skips what its folder already holds."""
    in_sweep = not OmegaConf.is_missing(HydraConfig.get().job, "num")
    try:
        run_cell(cfg, show=not in_sweep)
    except Exception as error:
        if in_sweep:  # Hydra goes on, and tells of the first failure alone
            log.error("failed: %s", error, exc_info=not isinstance(error, UserError))
            let_go(error)  # Hydra keeps the error, and with it networks and images
        raise


def let_go(error: BaseException | None) -> None:
    """Forget the local variables of the calls that an error came through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def run_cell(cfg: DictConfig, show: bool) -> None:
    """One dataset, method, IPC and seed; `show` prints the table."""
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    # A distilled set lies one level up, where every protocol that scores it finds it.
    out = run_dir.parent if run_dir.parent.name == Path(cfg.folder).name else run_dir

    with nothing_left_behind(run_dir):
        validate(cfg)
        ranks, device = join(pick_device(cfg.device))  # first: it says which GPU is this process's
        dataset, tracker = (build(cfg, k) for k in ("dataset", "tracker"))
        protocol = build_protocol(cfg)
        students = expand_students(student_names(cfg))
        execution = Execution(
            device=device,
            channels_last=cfg.channels_last,
            compile=cfg.compile,
            ranks=ranks,
            parallel=cfg.parallel,
        )
        for student in students:
            find_student(student, protocol.image_size)
            protocol.recipe(cfg.ipc, len(dataset.classes), student)
        distiller = build_distiller(cfg, ranks)
    if dataset.note:
        log.warning("dataset=%s: %s", dataset.name, dataset.note)

    test = TestImages(dataset, Path(cfg.cache), cfg.workers)
    # Two sweeps may meet in a set that both train students on: the second waits for the first.
    with exclusive(run_dir, patient=not show) if ranks.first else nullcontext():
        if ranks.first:
            remove_leftovers(run_dir)
        ranks.wait()
        test.check()
        wanted = list(product(students, student_seeds(cfg)))
        if missing_rows(run_dir, wanted):  # refuse a teacher before hours of sampling, not after
            ranks.in_turn(lambda: protocol.prepare(test, device))
        distilled = distil(cfg, dataset, distiller, out, ranks)
        log.info("distilled dataset: %s", out)
        if not wanted:
            return
        if ranks.first:
            claim_folder(run_dir, cfg, "protocol.json", ("protocol",))
        run_id = identity(cfg, DISTILLATION_KEYS + EVALUATION_KEYS)
        ids = RunIds(run=run_id, cell=identity(cfg, CELL_KEYS))
        experiment = HydraConfig.get().runtime.choices.get("experiment")
        group = experiment or f"{dataset.name}-ipc{cfg.ipc}"
        start = partial(tracker.start, ranks.named(run_id), group, plain(cfg), run_dir)
        rows = score(distilled, test, protocol, wanted, run_dir, ids, start, execution)
        if cfg.report and ranks.first:
            title = f"{dataset.name}, {cfg.ipc} images per class, {cfg.method.name}"
            write_report(run_dir / "report.html", rows, [distilled], dataset, title)
    if show and ranks.first:
        Console().print(terminal(rows))
    for row in rows:
        log.info(
            "%s, ipc %d, %s, seeds %d/%d: top1_last %.1f, top1_best %.1f",
            *(row.dataset, row.ipc, f"{row.method}, {row.student}"),
            *(row.distill_seed, row.student_seed, row.top1_last, row.top1_best),
        )
    log.info("results: %s", run_dir)


def distil(
    cfg: DictConfig, dataset: RealDataset, distiller: Distiller, out: Path, ranks: Ranks
) -> DistilledDataset:
    """The finished distilled dataset in `out`, made now if it is not there."""
    distilled = DistilledDataset(out)
    with waiting(out) if ranks.first else nullcontext():
        if ranks.first:
            remove_leftovers(out, out / "modes", *out.glob("images/*"), *out.glob("pool/images/*"))
            names = {info.wnid: info.name for info in dataset.classes}  # classes.csv makes prompts
            claim_folder(out, cfg, "identity.json", DISTILLATION_KEYS, classes=names)
        done = ranks.agreed(ranks.first and distilled.complete, pick_device(cfg.device))
        if done or not (ranks.first or shares_work(distiller)):
            ranks.wait()
            return distilled
        choices = HydraConfig.get().runtime.choices
        provenance = {
            "method": cfg.method.name,
            "machine": machine_name(pick_device(cfg.device), ranks.world),
            "choices": {group: choices[group] for group in DISTILLATION_KEYS if group in choices},
            "config": {key: part_of_identity(cfg, key) for key in DISTILLATION_KEYS},
        }
        distilled = distiller.distill(dataset, cfg.ipc, cfg.seed, out, provenance)
        ranks.wait()
        return distilled


main = hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")(run)

if __name__ == "__main__":
    keep_freed_memory()
    register()
    with errors_for_people():
        main()

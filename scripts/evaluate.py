"""Train students on images that exist, made by anything, and report their accuracy."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.evaluate import Execution, RunIds, score
from eval.external import adopt
from eval.images import TestImages
from eval.reports.run_report import distilled_sets
from eval.results.tables import terminal
from eval.students.registry import expand_students, find_student
from mgd3.config.build import build, build_protocol, claim_folder
from mgd3.config.schema import (
    CONFIGS,
    errors_for_people,
    part_of_identity,
    plain,
    register,
    student_names,
    student_seeds,
    validate,
    values_digest,
)
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.compute import pick_device
from mgd3.runtime.distributed import join
from mgd3.runtime.errors import UserError
from mgd3.runtime.files import exclusive, nothing_left_behind, remove_leftovers
from mgd3.runtime.machine import keep_freed_memory

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Score every set that `images` names; rows that exist are kept."""
    with nothing_left_behind(Path(HydraConfig.get().runtime.output_dir)):
        validate(cfg)
        ranks, device = join(pick_device(cfg.device))
        dataset, tracker = (build(cfg, key) for key in ("dataset", "tracker"))
        protocol = build_protocol(cfg)
        execution = Execution(
            device=device,
            channels_last=cfg.channels_last,
            compile=cfg.compile,
            ranks=ranks,
            parallel=cfg.parallel,
        )
        students = expand_students(student_names(cfg))
        if not students:
            raise UserError("students=[] leaves nothing to do; name one, such as [convnet6]")
        sets = ranks.in_turn(lambda: find_sets(cfg, dataset))
        for student, distilled in product(students, sets):
            find_student(student, protocol.image_size)
            protocol.recipe(distilled.ipc, len(dataset.classes), student)
    test = TestImages(dataset, Path(cfg.cache), cfg.workers)
    test.check()
    rows = []
    for distilled in sets:
        made_by = distilled.manifest["config"] | {"protocol": plain(cfg.protocol)}
        if (tested_on := part_of_identity(cfg, "dataset")) != made_by["dataset"]:
            made_by["tested_on"] = tested_on
        cell = values_digest({key: value for key, value in made_by.items() if key != "seed"})
        run_id = values_digest(made_by)
        folder = distilled.folder / f"{protocol.name}-{run_id}"
        with exclusive(folder) if ranks.first else nullcontext():
            if ranks.first:
                remove_leftovers(folder)
            ranks.wait()
            claim_folder(folder, cfg, "protocol.json", ("protocol",))
            group = f"{dataset.name}-ipc{distilled.ipc}"
            start = partial(tracker.start, ranks.named(run_id), group, plain(cfg), folder)
            wanted = list(product(students, student_seeds(cfg)))
            ids = RunIds(run=run_id, cell=cell)
            rows += score(distilled, test, protocol, wanted, folder, ids, start, execution)
        log.info("results: %s", folder)
    if ranks.first:
        Console().print(terminal(rows))


def find_sets(cfg: DictConfig, dataset: RealDataset) -> list[DistilledDataset]:
    """The finished distilled datasets in or below `images`, or its class folders as one.

    Raises `UserError` if a set's classes are not the dataset's, in its order.
    """
    folder = Path(cfg.images)
    sets = distilled_sets(folder)
    if not sets:
        name = cfg.title or folder.resolve().name
        config = part_of_identity(cfg, "dataset")
        return [adopt(folder, dataset, str(name), Path(cfg.runs), config)]
    wnids = [c.wnid for c in dataset.classes]
    for distilled in sets:
        theirs = [c.wnid for c in distilled.classes]
        if theirs != wnids:
            raise UserError(
                f"{distilled.folder} holds {len(theirs)} classes of "
                f"{distilled.manifest['dataset']}, not the {len(wnids)} of dataset={dataset.name} "
                "in their order; name its own dataset"
            )
    return sets


if __name__ == "__main__":
    keep_freed_memory()
    register()
    with errors_for_people():
        main()

"""Train students on images that exist, made by anything, and report their accuracy."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig

from mgd3.config.schema import CONFIGS
from mgd3.runtime.errors import UserError

if TYPE_CHECKING:
    from eval.images import TestImages
    from eval.results.rows import EvalResult
    from eval.scoring import Execution
    from mgd3.data.datasets import RealDataset
    from mgd3.data.distilled import DistilledDataset
    from mgd3.data.inventory import SplitContent

log = logging.getLogger(__name__)

_REMEDY = "name the new data apart with dataset.name=NAME, or delete that folder"


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="evaluate")
def main(cfg: DictConfig) -> None:
    """Score every set that `images` names; rows that exist are kept."""
    from rich.console import Console

    from eval.images import TestImages
    from eval.results.tables import terminal
    from eval.scoring import Execution
    from mgd3.config.build import build, build_execution, build_protocol
    from mgd3.config.run_folder import begun, record
    from mgd3.config.schema import validate
    from mgd3.runtime.compute import pick_device
    from mgd3.runtime.distributed import join

    with begun(cfg) as folder:
        validate(cfg)
        dataset, tracker = (build(cfg, key) for key in ("dataset", "tracker"))
        ranks, device = join(pick_device(cfg.compute.device))
        protocol = build_protocol(cfg)
        execution = Execution(device=device, ranks=ranks, **build_execution(cfg))
        students = _students(cfg)
        sets = ranks.in_turn(lambda: find_sets(cfg, dataset))
        _check(protocol, students, sets, device)
    if ranks.first:
        record(folder, cfg)
    test = TestImages(dataset, Path(cfg.cache), cfg.compute.workers)
    contents = ranks.in_turn(lambda: _contents(cfg, dataset))
    rows: list[EvalResult] = []
    for distilled in sets:
        rows += _scored(cfg, distilled, test, protocol, students, contents, tracker, execution)
    if ranks.first:
        Console().print(terminal(rows))


def _students(cfg: DictConfig) -> list[str]:
    from eval.students.registry import expand_students
    from mgd3.config.schema import student_names

    students = expand_students(student_names(cfg))
    if not students:
        raise UserError("students=[] leaves nothing to do; name one, such as [convnet6]")
    return students


def _check(protocol: Any, students: list[str], sets: list[DistilledDataset], device: Any) -> None:
    """Refuse students and sizes that the protocol cannot train before anything is trained."""
    from eval.protocols.feasibility import require_feasible

    for distilled in sets:
        require_feasible(protocol, students, distilled.ipc, len(distilled.classes), device)


def _contents(cfg: DictConfig, dataset: RealDataset) -> dict[str, SplitContent]:
    """What the real images are that scores depend on."""
    from mgd3.config import identity
    from mgd3.data.inventory import contents_of

    splits = ["val", *(["train"] if identity.protocol_reads_train(cfg) else [])]
    return contents_of(dataset, splits, Path(cfg.cache), cfg.compute.workers)


def _scored(
    cfg: DictConfig,
    distilled: DistilledDataset,
    test: TestImages,
    protocol: Any,
    students: list[str],
    contents: Mapping[str, SplitContent],
    tracker: Any,
    execution: Execution,
) -> list[EvalResult]:
    """The rows of one set."""
    from eval.scoring import RunIds, score
    from mgd3.config import identity
    from mgd3.config.schema import choices, plain, student_seeds
    from mgd3.data.claims import claim
    from mgd3.storage.digests import content_digests
    from mgd3.storage.files import exclusive, refuse_links, remove_leftovers

    scored_by, ranks = identity.score_identity(cfg, choices(cfg)), execution.ranks
    whole = distilled.identity | scored_by
    tested_on = identity.dataset_identity(cfg, choices(cfg))
    if test.dataset.name != distilled.manifest["dataset"]:
        tested_on = tested_on | {"name": test.dataset.name}
    if tested_on != whole.get("dataset"):
        whole["tested_on"] = tested_on
    data = {"train": distilled.manifest["data"]["train"], "val": contents["val"].digest}
    run_id = identity.digest(whole)
    ids = RunIds(run=run_id, cell=identity.cell_id(whole, data), **data)
    folder = distilled.folder / f"{protocol.name}-{run_id}"
    if ranks.first:
        refuse_links(distilled.folder)
    with exclusive(folder) if ranks.first else nullcontext():
        if ranks.first:
            remove_leftovers(folder)
            distilled.verify(Path(cfg.cache), cfg.compute.workers)
            files = content_digests(identity.score_files(cfg), Path(cfg.cache))
            path, cache = folder / "protocol.json", Path(cfg.cache)
            claim(path, scored_by, contents, cache, _REMEDY, files=files)
        ranks.wait()
        group = f"{test.dataset.name}-ipc{distilled.ipc}"
        named, records = ranks.named(run_id), Path(cfg.runs)
        start = partial(tracker.start, named, group, plain(cfg), records)
        wanted = list(product(students, student_seeds(cfg)))
        rows = score(distilled, test, protocol, wanted, folder, ids, start, execution)
    log.info("results: %s", folder)
    return rows


def find_sets(cfg: DictConfig, dataset: RealDataset) -> list[DistilledDataset]:
    """The finished distilled datasets in or below `images`, or its class folders as one.

    Raises `UserError` if a set's classes are not the dataset's, in its order.
    """
    from eval.external import adopt
    from eval.hub import local_images
    from eval.reports.run_report import distilled_sets, parted
    from mgd3.config import identity
    from mgd3.config.schema import choices
    from mgd3.runtime import checks

    folder = local_images(str(cfg.images), Path(cfg.runs))
    sets, elsewhere = parted(distilled_sets(folder))
    if elsewhere and not sets:
        _ = elsewhere[0].path(elsewhere[0].manifest["images"][0])  # says what to do
    if not sets:
        name = checks.name("title", str(cfg.title or folder.resolve().name))
        made_from = {"dataset": identity.dataset_identity(cfg, choices(cfg))}
        return [adopt(folder, dataset, name, Path(cfg.runs), made_from)]
    wnids = [c.wnid for c in dataset.classes]
    for distilled in sets:
        theirs = [c.wnid for c in distilled.classes]
        if theirs != wnids:
            raise UserError(
                f"{distilled.folder} holds {len(theirs)} classes of "
                f"{distilled.manifest['dataset']}, not the {len(wnids)} of dataset={dataset.name} "
                "in their order; name its own dataset"
            )
        _ = distilled.identity  # a set of an earlier version is refused now
    return sets


if __name__ == "__main__":
    command(main)

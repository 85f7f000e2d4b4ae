"""Run a table or figure of a paper: what is missing, wherever Hydra's launcher sends it."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

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
    from mgd3.config.grid import Experiment, Located
    from mgd3.runtime.distributed import Ranks

Launch: TypeAlias = Callable[[Sequence[Sequence[str]]], Sequence[Any]]
Problems: TypeAlias = "dict[Path | None, str]"  # by folder of scores; None: of all others

ROOT = str(Path(__file__).resolve().parents[1])
_MOST_CELLS = 8  # named for one problem


def reproduce(cfg: DictConfig, arguments: list[str], launch: Launch) -> None:
    """Launch what is missing, report what failed, write the tables.

    Raises `UserError` unless all is there in the end.
    """
    from rich.console import Console

    from mgd3.config.grid import Experiment, read_request
    from scripts.explain import explain
    from scripts.plan import plan

    _refuse_folders(cfg)
    request = read_request(cfg, arguments)
    console = Console(markup=False)
    if cfg.explain is not None:
        for line in explain(cfg, request):
            console.print(line, soft_wrap=True, highlight=False)
        return
    experiment = Experiment(request.name, request.overrides, request.only, cfg.rehearsal)
    for row, why in experiment.unfit.items():
        raise UserError(f"row «{row}» cannot be run so: {why}; leave it out with only.row=…")
    ranks, missing = _agreed(experiment)
    pending = [place for place, miss in zip(experiment.located, missing, strict=True) if miss]
    if cfg.plan:
        layout, notes = plan(experiment.located, pending)
        console.print(layout.for_terminal(), *notes, sep="\n")
        return
    done = len(experiment.located) - len(pending)
    console.print(f"{experiment.name}: {done} runs done, {len(pending)} to do")
    ready, problems = _ready(pending)
    if ready:
        problems |= launched(ready, launch)
    elif pending:
        raise UserError("; ".join(dict.fromkeys(problems.values())))
    if ranks.first:
        _report(experiment, pending, problems, console)


def _refuse_folders(cfg: DictConfig) -> None:
    for override in cfg.hydra.overrides.hydra:
        if override.lstrip("+~").startswith(("hydra.run", "hydra.sweep.")):
            raise UserError(f"{override}: folders follow from configurations here; set runs=FOLDER")


def _agreed(experiment: Experiment) -> tuple[Ranks, list[bool]]:
    """This process among its kind, and which runs are missing: the first one's list for all."""
    from mgd3.runtime.compute import pick_device
    from mgd3.runtime.distributed import Ranks, join

    missing = [not _done(place) for place in experiment.located]
    if "WORLD_SIZE" not in os.environ:
        return Ranks(), missing
    ranks, device = join(pick_device(experiment.located[0].cfg.compute.device))
    return ranks, [bool(flag) for flag in ranks.agreed_list(missing, device)]


def _report(
    experiment: Experiment, pending: Sequence[Located], problems: Problems, console: Any
) -> None:
    """Name what failed, print the tables, write those of every cell, filters or not."""
    from scripts.make_tables import show_tables

    failed = [place for place in pending if not _done(place)]
    for what, cells in _by_problem(failed, problems).items():
        shown = cells if len(cells) <= _MOST_CELLS else [*cells[:_MOST_CELLS], "…"]
        print(f"failed, {len(cells)} runs: {what}", file=sys.stderr)
        print(*(f"  {cell}" for cell in shown), sep="\n", file=sys.stderr)
    show_tables(experiment, console)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(experiment.located)} runs of {experiment.name} are missing; "
            "what is finished is kept, and the same command goes on with the rest"
        )


def _ready(pending: Sequence[Located]) -> tuple[list[Located], Problems]:
    """The runs whose real images are there, and what the others lack."""
    from mgd3.config import identity
    from mgd3.config.build import build
    from mgd3.config.schema import choices

    ready: list[Located] = []
    problems: Problems = {}
    known: dict[str, str] = {}
    for place in pending:
        part = identity.set_identity(place.cfg, choices(place.cfg))["dataset"]
        dataset = json.dumps([part, place.cfg.dataset.get("root")], sort_keys=True)
        if dataset not in known:
            known[dataset] = ""
            try:
                build(place.cfg, "dataset")
            except UserError as error:
                known[dataset] = str(error)
        if known[dataset]:
            problems[place.folder] = known[dataset]
        else:
            ready.append(place)
    return ready, problems


def _by_problem(failed: Sequence[Located], problems: Problems) -> dict[str, list[str]]:
    """Cells, with their logs where there are any, by what went wrong."""
    found: dict[str, list[str]] = defaultdict(list)
    for place in failed:
        job, log = place.job, place.folder / "run.log"
        what = problems.get(place.folder) or problems.get(None) or "it ended without a result"
        where = f" ({log})" if log.is_file() else ""
        found[what].append(f"{job.row}, {job.dataset}, ipc {job.ipc}, seed {job.seed}{where}")
    return found


def launched(pending: Sequence[Located], launch: Launch) -> Problems:
    """Run all through Hydra's launcher; what went wrong.

    Rows that share a run, students and all, are one job.
    """
    from hydra.core.utils import JobReturn, JobStatus

    jobs = {(p.folder, frozenset(p.wanted)): list(p.job.overrides) for p in pending}
    try:
        returned = launch(list(jobs.values()))
    except Exception as error:  # a launcher's own: what became of each job, the disk tells
        text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        return {
            None: f"the launcher lost a job ({text[-400:]}). Was it killed, or has that "
            "machine another Python than this one, without the packages? "
            "hydra.launcher.setup=[…] runs commands before a SLURM job. Jobs after it may "
            "still be running"
        }
    return {
        folder: _in_one_line(done._return_value)
        for (folder, _), done in zip(jobs, returned, strict=True)
        if isinstance(done, JobReturn) and done.status == JobStatus.FAILED
    }


def _done(place: Located) -> bool:
    from eval.scoring import missing_rows
    from mgd3.data.distilled import DistilledDataset

    if missing_rows(place.folder, list(place.wanted)):
        return False
    if not place.wanted:
        return DistilledDataset(place.distilled).complete
    rows, table = (place.folder / name for name in ("results.jsonl", "table.md"))
    # a run writes its table last
    return table.is_file() and table.stat().st_mtime_ns >= rows.stat().st_mtime_ns


def _in_one_line(error: Any) -> str:
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return name + (" ".join(str(error).split())[:600] or "no message")


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="reproduce")
def main(cfg: DictConfig) -> Any:
    """One run, in this process or in one of a launcher's, which knows no path of ours."""
    sys.path.insert(0, ROOT)
    from run import run

    try:
        return run(cfg)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the others wait for it in this very run
            sys.exit(f"error: {_in_one_line(error)}; the same command goes on")
        raise


if __name__ == "__main__":
    command(main)

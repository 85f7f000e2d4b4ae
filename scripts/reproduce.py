"""Run a table or figure of the paper: what is missing, wherever Hydra's launcher sends it."""

from __future__ import annotations

import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks  # a launcher's context needs one
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


from eval.evaluate import missing_rows
from mgd3.config.build import build
from mgd3.config.grid import Experiment, Located
from mgd3.config.requests import paper_experiments, read_request
from mgd3.config.schema import CONFIGS, errors_for_people, part_of_identity, register
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.compute import pick_device
from mgd3.runtime.distributed import Ranks, join
from mgd3.runtime.errors import UserError
from mgd3.runtime.machine import keep_freed_memory
from scripts.make_tables import write_tables
from scripts.plan import plan

Problems: TypeAlias = dict[Path | None, str]  # by folder of scores; None: of all others

_MOST_CELLS = 8  # named for one problem
ROOT = str(Path(__file__).resolve().parents[1])

USAGE = f"""Run a table or figure of the paper, then write its tables and report.

  python scripts/reproduce.py table=1                   what is not done yet
  python scripts/reproduce.py table=1 plan=true         says what it would take; starts nothing
  python scripts/reproduce.py table=1 rehearsal=true    the same grid on digits, in minutes
  python scripts/reproduce.py figure=7 only=ipc=10 only=seed=0,1
  python scripts/reproduce.py table=1 hydra/launcher=submitit_slurm hydra.launcher.partition=gpu
  torchrun --nproc-per-node=4 scripts/reproduce.py table=1      each run by four GPUs

only=KEY=VALUE,… keeps some cells; KEY is row, dataset, ipc, seed or student. What else is KEY=VALUE
goes to run.py (precision=bfloat16, batch_size=auto, dataset.root=PATH, hydra/launcher=NAME …).
There are: {", ".join(paper_experiments())}."""


def main() -> None:
    """Launch what is missing, report what failed, write the tables; exit 1 unless all is there."""
    request = read_request(sys.argv[1:], ("plan", "rehearsal"), USAGE)
    for_launcher = [o for o in request.overrides if o.lstrip("+~").startswith("hydra")]
    for override in for_launcher:
        if override.lstrip("+~").startswith(("hydra.run", "hydra.sweep")):
            raise UserError(f"{override}: folders follow from configurations here; set runs=FOLDER")
    overrides = [o for o in request.overrides if o not in for_launcher]
    experiment = Experiment(
        request.experiment, overrides, request.only, rehearsal=request.flags["rehearsal"]
    )
    for row, why in experiment.unfit.items():
        raise UserError(f"row «{row}» cannot be run so: {why}; leave it out with only=row=…")
    ranks, missing = Ranks(), [not _done(place) for place in experiment.located]
    if "WORLD_SIZE" in os.environ:  # of several processes, all take the first one's list
        ranks, device = join(pick_device(experiment.located[0].cfg.device))
        missing = [bool(flag) for flag in ranks.agreed_list(missing, device)]
    pending = [place for place, miss in zip(experiment.located, missing, strict=True) if miss]
    console = Console(markup=False)
    if request.flags["plan"]:
        layout, notes = plan(experiment.located, pending)
        console.print(layout.for_terminal(), *notes, sep="\n")
        return
    console.print(
        f"{experiment.name}: {len(experiment.located) - len(pending)} runs done, ", end=""
    )
    console.print(f"{len(pending)} to do")
    ready, problems = _ready(pending)
    if ready:
        problems |= launch(ready, for_launcher)
    elif pending:
        raise UserError("; ".join(dict.fromkeys(problems.values())))
    if not ranks.first:  # it reports
        return
    failed = [place for place in pending if not _done(place)]
    for what, cells in _by_problem(failed, problems).items():
        shown = cells if len(cells) <= _MOST_CELLS else [*cells[:_MOST_CELLS], "…"]
        print(f"failed, {len(cells)} runs: {what}", file=sys.stderr)
        print(*(f"  {cell}" for cell in shown), sep="\n", file=sys.stderr)
    every_cell = experiment
    if request.only:  # the table shows what earlier calls have run as well
        every_cell = Experiment(request.experiment, overrides, (), experiment.rehearsal)
    folder = write_tables(every_cell)
    console.print(f"tables and report: {folder}", soft_wrap=True)
    if failed:
        raise UserError(
            f"{len(failed)} of {len(experiment.located)} runs of {experiment.name} are missing; "
            "what is finished is kept, and the same command goes on with the rest"
        )


def _ready(pending: Sequence[Located]) -> tuple[list[Located], Problems]:
    """The runs whose real images are there, and what the others lack."""
    ready, problems, known = [], {}, {}
    for place in pending:
        dataset = json.dumps(part_of_identity(place.cfg, "dataset"), sort_keys=True)
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


def launch(pending: Sequence[Located], for_launcher: Sequence[str]) -> Problems:
    """Run all through Hydra's launcher; what went wrong.

    Rows that share a run, students and all, are one job.
    """
    jobs = {(p.folder, frozenset(p.wanted)): list(p.job.overrides) for p in pending}
    with initialize_config_dir(CONFIGS, version_base="1.3", job_name="run"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("config", list(for_launcher), RunMode.MULTIRUN)
        configure_log(config.hydra.hydra_logging, config.hydra.verbose)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=HydraContext(hydra.config_loader, Callbacks(config)),
            task_function=task,
            config=config,
        )
        try:
            returned = launcher.launch(list(jobs.values()), initial_job_idx=0)
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


def task(cfg: DictConfig) -> Any:
    """One run, in this process or in one of a launcher's, which knows no path of ours."""
    sys.path.insert(0, ROOT)
    from run import run

    try:
        return run(cfg)
    except Exception as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the others wait for it in this very run
            sys.exit(f"error: {_in_one_line(error)}; the same command goes on")
        raise


def _done(place: Located) -> bool:
    if missing_rows(place.folder, list(place.wanted)):
        return False
    return bool(place.wanted) or DistilledDataset(place.distilled).complete


def _in_one_line(error: Any) -> str:
    name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    return name + (" ".join(str(error).split())[:600] or "no message")


if __name__ == "__main__":
    keep_freed_memory()
    register()
    with errors_for_people():
        main()

"""The paper's tables and figures as grids of runs: what there is to run, and where its files lie.

An experiment file's `table` node says it: `rows` names what the paper compares and the overrides of
each, `grid` the datasets, images per class and seeds that every row runs over. A row may fix a grid
key for itself, and `ipc: full` is the full real set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgd3.config.paper import PLACES, read_table
from mgd3.config.schema import (
    CONFIGS,
    DISTILLATION_KEYS,
    EVALUATION_KEYS,
    explained,
    identity,
    plain,
    student_names,
    student_seeds,
    values_digest,
)
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

FULL = "full"  # as an `ipc`: all real images
_PARTS = ("dataset", "backbone", "protocol")  # that a rehearsal replaces in every row
# Overrides that change no number.
_NEUTRAL = (
    "tracker", "batch_size", "device", "workers", "cache", "compile", "channels_last", "parallel",
    "vae_slicing", "dataset.root", "runs", "report",
)  # fmt: skip
_FILTERS = ("row", *PLACES, "student")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of run.py and the paper's place for it (a rehearsal keeps the paper's names)."""

    row: str
    dataset: str
    ipc: str  # a number, or «full»
    seed: int
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Located:
    """A job with what it will make."""

    job: Job
    distilled: Path  # the distilled dataset's folder
    folder: Path  # the scores', below it
    wanted: Mapping[tuple[str, int], str]  # (student, seed) to the paper's name of the student
    cfg: DictConfig


class Experiment:
    """One experiment file, perhaps filtered, overridden or in rehearsal."""

    def __init__(
        self,
        name: str,
        overrides: Sequence[str] = (),
        only: Sequence[str] = (),
        rehearsal: bool = False,
    ) -> None:
        """Raises `UserError` for an unknown experiment and for a filter that leaves nothing."""
        known = sorted(p.stem for p in Path(CONFIGS, "experiment").glob("*.yaml"))
        self.name = checks.choice("experiment", name, known)
        self.overrides, self.rehearsal = tuple(overrides), rehearsal
        base = _compose([f"experiment={name}", *overrides], with_hydra=True)
        if base.table is None:
            raise UserError(
                f"experiment={name} is not a table or figure of the paper; run it as «python "
                f"run.py experiment={name}»"
            )
        self.table = read_table(plain(base.table))
        self.students = student_names(base)  # the paper's
        for group in (s for s in self.students if s.startswith("cross_arch")):
            raise UserError(f"students: name the four students that {group} stands for")
        self._refuse_overrides()
        self._choices = base.hydra.runtime.choices
        self._only = _filters(only)
        self._unfit: dict[str, str] = {}
        self._stand_ins = _stand_ins() if rehearsal else {}
        self.jobs = [job for job in self._every_job() if self._kept(job)]
        there = "; ".join(f"{key}={', '.join(v)}" for key, v in self._values().items())
        for key, values in self._only.items():
            if unknown := [v for v in values if v not in self._values()[key]]:
                raise UserError(
                    f"only={key}={unknown[0]}: {name} has no such {key}; there are {there}"
                )
        if not self.jobs:
            raise UserError(
                f"only={' only='.join(only)} leaves no run of {name}; there are {there}"
            )

    @property
    def variant(self) -> str:
        """The name, and where overrides make other numbers, what tells them apart."""
        own = [o for o in self.overrides if o.lstrip("+").split("=")[0] not in _NEUTRAL]
        return self.name + (f"-{values_digest({'overrides': own})}" if own else "")

    def _refuse_overrides(self) -> None:
        """An override of what the table varies would put runs into cells that are not theirs."""
        rows = self.table.rows.values()
        varied = {*PLACES, *(key for options in rows for key in options)}
        several = len({options.get("backbone") for options in rows}) > 1
        for override in self.overrides:
            key = override.lstrip("+~").split("=")[0]
            of_one = several and key.startswith("backbone.")
            if of_one or any(v == key or v.startswith(f"{key}.") for v in varied):
                raise UserError(
                    f"{override}: {self.name} varies {key.split('.')[0]} itself; choose among its "
                    "cells with only=KEY=VALUE, or copy its file for another table"
                )

    def locate(self, job: Job) -> Located:
        """Where a job's files lie, from its composed configuration."""
        cfg = self._composed(job)
        wanted = {
            (self._student(job.row, student), seed): student
            for student, seed in product(self._students(), student_seeds(cfg))
        }
        distilled = Path(cfg.runs) / cfg.folder
        run_id = identity(cfg, DISTILLATION_KEYS + EVALUATION_KEYS)
        return Located(
            job=job,
            distilled=distilled,
            folder=distilled / f"{cfg.protocol.name}-{run_id}",
            wanted=wanted,
            cfg=cfg,
        )

    @cached_property
    def located(self) -> list[Located]:
        """Every job's place, but for those of rows that the overrides do not fit."""
        found = []
        with _hydra():
            for job in self.jobs:
                try:
                    found.append(self.locate(job))
                except (HydraException, OmegaConfBaseException) as error:
                    if not self.overrides:
                        raise
                    self._unfit[job.row] = explained(error)
        return found

    @property
    def unfit(self) -> dict[str, str]:
        """Rows that cannot be run with the overrides, and why."""
        _ = self.located
        return self._unfit

    def notes(self) -> list[str]:
        """What a reader must know before the numbers: stand-ins, overridden protocols."""
        found = []
        if self.rehearsal:
            found.append(
                "Rehearsal: digits, a small backbone, small students and short trainings stand "
                "for the paper's (configs/rehearsal.yaml). Nothing here compares with the paper."
            )
        if self.overrides:
            found.append(f"Run with {' '.join(self.overrides)}.")
        found += [f"Row {row} cannot be run so: {why}." for row, why in self.unfit.items()]
        return found

    def _every_job(self) -> list[Job]:
        jobs = []
        for row, options in self.table.rows.items():
            axes = [[options[key]] if key in options else self.table.grid[key] for key in PLACES]
            rest = {k: v for k, v in options.items() if k not in (*PLACES, "students")}
            for dataset, ipc, seed in product(*axes):
                values = {"dataset": dataset, **rest, "ipc": ipc, "seed": seed}
                jobs.append(
                    Job(
                        row=row,
                        dataset=str(dataset),
                        ipc=str(ipc),
                        seed=seed,
                        overrides=self._overrides(row, values),
                    )
                )
        return jobs

    def _overrides(self, row: str, values: Mapping[str, Any]) -> tuple[str, ...]:
        """run.py's arguments for one job."""
        groups = {g: self._choices[g] for g in _PARTS if g in self._stand_ins}
        found = [f"experiment={self.name}"]
        for key, value in (groups | dict(values)).items():
            if (key, value) == ("ipc", FULL):
                continue
            found += self._stand_ins.get(key, {}).get(value, [f"{key}={_spelt(value)}"])
        students = [self._student(row, student) for student in self._students()]
        found.append(f"students=[{','.join(dict.fromkeys(students))}]")
        return (*found, *self._stand_ins.get("always", {}).get("always", []), *self.overrides)

    def _student(self, row: str, name: str) -> str:
        """What is trained in this row where the paper's student is `name`."""
        name = self.table.rows[row].get("students", {}).get(name, name)
        return self._stand_ins.get("students", {}).get(name, name)

    def _students(self) -> list[str]:
        wanted = self._only.get("student")
        return [s for s in self.students if wanted is None or s in wanted]

    def _kept(self, job: Job) -> bool:
        if self.rehearsal and job.seed not in (0, 1):
            return False
        return all(
            key == "student" or str(getattr(job, key)) in values
            for key, values in self._only.items()
        )

    def _values(self) -> dict[str, list[str]]:
        grid = {key: [str(v) for v in self.table.grid[key]] for key in PLACES}
        for options in self.table.rows.values():
            for key in PLACES:
                if key in options and str(options[key]) not in grid[key]:
                    grid[key].append(str(options[key]))
        return {"row": list(self.table.rows), **grid, "student": self.students}

    def _composed(self, job: Job) -> DictConfig:
        """The job's configuration; jobs that differ in IPC and seed alone share a composition."""
        values = dict(o.split("=", 1) for o in job.overrides if o.startswith(("ipc=", "seed=")))
        shared = tuple(o for o in job.overrides if not o.startswith(("ipc=", "seed=")))
        if shared not in self._compositions:
            self._compositions[shared] = _compose(shared)
        cfg = self._compositions[shared].copy()
        for key, value in values.items():
            cfg[key] = int(value)
        return cfg

    @cached_property
    def _compositions(self) -> dict[tuple[str, ...], DictConfig]:
        return {}


def _filters(only: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for text in only:
        key, is_pair, values = text.partition("=")
        checks.choice("the key of only=KEY=VALUE,…", key, _FILTERS)
        if not is_pair:
            raise UserError(f"only={text}: give values, such as only=ipc=10,20")
        found[key] = found.get(key, []) + values.split(",")
    return found


def _stand_ins() -> dict[str, Any]:
    return plain(OmegaConf.load(Path(CONFIGS, "rehearsal.yaml")))


def _spelt(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_spelt, value))}]"
    return f'"{value}"' if isinstance(value, str) and set(value) & set(" ,:=[]{}") else str(value)


def _compose(overrides: Sequence[str], with_hydra: bool = False) -> DictConfig:
    with _hydra():
        return compose("config", list(overrides), return_hydra_config=with_hydra)


@contextmanager
def _hydra() -> Iterator[None]:
    """Hydra's state, made where there is none yet."""
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_dir(CONFIGS, version_base="1.3", job_name="run"):
        yield

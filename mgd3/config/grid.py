"""The papers' tables and figures as grids of runs: what there is to run, and where its files lie.

A file below configs/paper says it in its `paper_table` node: `rows` names what the paper compares
and the overrides of each, `grid` the datasets, images per class and seeds that every row runs over.
A row may fix a grid key for itself, and `ipc: full` is the full real set.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from mgd3.config import identity
from mgd3.config.arguments import OF_DATASET
from mgd3.config.command import explained
from mgd3.config.families import evaluator_family, refuse_mixed_families
from mgd3.config.paper import PLACES, read_table
from mgd3.config.schema import CONFIGS, choices, composed, plain, student_names, student_seeds
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

_FIRST_PAPER = "mgd3"
FULL = "full"  # as an `ipc`: all real images
_PARTS = ("dataset", "backbone", "protocol")  # that a rehearsal replaces in every row
# Overrides that change no number.
_NEUTRAL = ("tracker", "dataset.root", "runs", "cache", "data", "report")
# Of compute: these do.
_ROUNDING = ("compute.precision", "compute.training_precision", "compute.encoding_precision")
_FILTERS = ("row", *PLACES, "student")
_OWN = ("table", "figure", "grid", "plan", "rehearsal", "explain")  # scripts/reproduce.py's


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


@dataclass(frozen=True, kw_only=True)
class Request:
    """One paper's table, some of its cells, and overrides of run.py."""

    name: str  # below configs/paper
    only: Mapping[str, Sequence[str]]
    overrides: tuple[str, ...]


def paper_files() -> list[str]:
    """Names below configs/paper, in the papers' order: MGD3's first."""
    folder = Path(CONFIGS, "paper")
    names = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml")]

    def order(name: str) -> tuple[bool, str, bool, int]:
        number = re.search(r"(table|figure)(\d+)$", name)
        kind, digits = number.groups() if number else ("", "0")
        paper = str(Path(name).parent)
        return paper != _FIRST_PAPER, paper, kind == "figure", int(digits)

    return sorted(names, key=order)


def read_request(cfg: DictConfig, arguments: Sequence[str]) -> Request:
    """What scripts/reproduce.py was asked for: `table=1`, `figure=7` or `grid=FOLDER/NAME`.

    A number alone is MGD3's; `table=self_adaptive_memory/1` is another paper's.
    """
    named = [(kind, cfg[kind]) for kind in ("table", "figure", "grid") if cfg[kind] is not None]
    if len(named) != 1:
        raise UserError(f"name one of them: table=1, figure=7, grid=FOLDER/NAME; got {len(named)}")
    ((kind, value),) = named
    name = str(value)
    if kind != "grid":
        known = {_number(n): n for n in paper_files() if f"/{kind}" in n}
        name = known[checks.choice(kind, name, known)]
    only, overrides = _split(arguments)
    return Request(name=name, only=only, overrides=tuple(overrides))


def _number(name: str) -> str:
    """What is typed for a file: 1 for mgd3/table1, PAPER/1 for another paper's."""
    folder, _, file = name.rpartition("/")
    number = re.sub(r"^(table|figure)", "", file)
    return number if folder == _FIRST_PAPER else f"{folder}/{number}"


def paper_argument(name: str) -> str:
    """What scripts/reproduce.py is given for a file: `table=1` for mgd3/table1."""
    kind = re.match(r"table|figure", name.rpartition("/")[2])
    return f"{kind[0]}={_number(name)}" if kind else f"grid={name}"


def _elsewhere(key: str, value: str) -> str:
    """Where else a dataset is, in words: which tables and figures have it."""
    if key != "dataset":
        return ""
    grids = {name: _grid_in(name) for name in paper_files()}
    found = [paper_argument(n) for n, grid in grids.items() if value in map(str, grid["dataset"])]
    return f"; {value} is in {', '.join(found)}" if found else ""


def _grid_in(name: str) -> Mapping[str, Sequence[Any]]:
    """The grid in a file below configs/paper, read without composing it."""
    return OmegaConf.load(Path(CONFIGS, "paper", f"{name}.yaml")).paper_table.grid


def _split(arguments: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Filters `only.KEY=VALUE,…` by key, and what goes to run.py: keys of the dataset as typed."""
    parser = OverridesParser.create()
    only: dict[str, list[str]] = {}
    rest = []
    for text in arguments:
        override = parser.parse_override(text)
        key = override.key_or_group
        if key.startswith("only."):
            value: Any = override.value()
            values = value.list if override.is_sweep_override() else value
            only[key.removeprefix("only.")] = [
                str(getattr(v, "text", v))
                for v in (values if isinstance(values, list) else [values])
            ]
        elif key not in _OWN:
            rest.append(text.removeprefix("++") if key.startswith(OF_DATASET) else text)
    return only, rest


class Experiment:
    """One experiment file, perhaps filtered, overridden or in rehearsal."""

    def __init__(
        self,
        name: str,
        overrides: Sequence[str] = (),
        only: Mapping[str, Sequence[str]] | None = None,
        rehearsal: bool = False,
    ) -> None:
        """`name` is a file's below configs/paper, such as mgd3/table1.

        Raises `UserError` for one that is not there and for a filter that leaves nothing.
        """
        self.file = name
        self.name = name.removeprefix(f"{_FIRST_PAPER}/").replace("/", "-")
        self.overrides, self.rehearsal = tuple(overrides), rehearsal
        base = composed(f"paper={name}", *overrides, name="reproduce")
        if base.paper_table is None:
            raise UserError(f"configs/paper/{name}.yaml has no paper_table node")
        self.table = read_table(plain(base.paper_table))
        self.students = student_names(base)  # the paper's
        for group in (s for s in self.students if s.startswith("cross_arch")):
            raise UserError(f"students: name the four students that {group} stands for")
        self._refuse_overrides()
        refuse_mixed_families(self.table, name)
        self._choices = choices(base)
        self._only = _filters(only or {})
        self._unfit: dict[str, str] = {}
        self._stand_ins = _stand_ins() if rehearsal else {}
        self.jobs = [job for job in self._every_job() if self._kept(job)]
        there = "; ".join(f"{key}={', '.join(v)}" for key, v in self._values().items())
        for key, values in self._only.items():
            if unknown := [v for v in values if v not in self._values()[key]]:
                raise UserError(
                    f"only.{key}={unknown[0]}: {self.name} has no such {key}; there are {there}"
                    f"{_elsewhere(key, unknown[0])}"
                )
        if not self.jobs:
            raise UserError(
                f"{' '.join(f'only.{k}={v}' for k, v in (only or {}).items())} leaves no run of "
                f"{self.name}; there are {there}"
            )

    def whole(self) -> Experiment:
        """The same without filters: every run of the table; compositions are shared."""
        found = Experiment(self.file, self.overrides, None, self.rehearsal)
        found._compositions.update(self._compositions)
        return found

    @property
    def variant(self) -> str:
        """The name, and where overrides make other numbers, what tells them apart."""
        own = f"-{identity.digest({'overrides': self._own})}" if self._own else ""
        return self.name + own

    @property
    def _own(self) -> list[str]:
        """Overrides that make other numbers."""
        return [o for o in self.overrides if not _is_neutral(o.lstrip("+").split("=")[0])]

    @property
    def shown_overrides(self) -> list[str]:
        """Overrides that make other numbers, without folders of this machine."""
        return [_without_folder(override) for override in self._own]

    def _refuse_overrides(self) -> None:
        """An override of what the table varies would put runs into cells that are not theirs."""
        rows = self.table.rows.values()
        varied = self.table.varied()
        several = len({options.get("backbone") for options in rows}) > 1
        for override in self.overrides:
            key = override.lstrip("+~").split("=")[0]
            of_one = several and key.startswith("backbone.")
            if of_one or any(v == key or v.startswith(f"{key}.") for v in varied):
                raise UserError(
                    f"{override}: {self.name} varies {key.split('.')[0]} itself; choose among its "
                    "cells with only.KEY=VALUE, or copy its file for another table"
                )

    def families(self) -> dict[str, str | None]:
        """The evaluator family that our runs of each row belong to."""
        return {place.job.row: evaluator_family(place.cfg) for place in self.located}

    def locate(self, job: Job) -> Located:
        """Where a job's files lie, from its composed configuration."""
        cfg = self._composed(job)
        wanted = {
            (self._student(job.row, student), seed): student
            for student, seed in product(self._students(), student_seeds(cfg))
        }
        of_set, run_id = identity.folders(cfg, choices(cfg))
        distilled = Path(cfg.runs) / of_set
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

    def class_names(self, names: Sequence[str]) -> list[str]:
        """Classes of the paper's data, in a rehearsal those that stand for them."""
        return [self._stand_ins.get("classes", {}).get(name, name) for name in names]

    def notes(self) -> list[str]:
        """What a reader must know before the numbers: stand-ins, overridden protocols."""
        found = []
        if self.rehearsal:
            found.append(
                "Rehearsal: digits, a small backbone, small students and short trainings stand "
                "for the paper's (configs/rehearsal.yaml). Nothing here compares with the paper."
            )
        if self._own:
            found.append(f"Run with {' '.join(self.shown_overrides)}.")
        found += [f"Row {row} cannot be run so: {why}." for row, why in self.unfit.items()]
        return found

    def _every_job(self) -> list[Job]:
        jobs = []
        for row, options in self.table.rows.items():
            axes = [[options[key]] if key in options else self.table.grid[key] for key in PLACES]
            for dataset, ipc, seed in product(*axes):
                own = self.table.overrides(row, dataset, ipc)
                values = {"dataset": dataset, **own, "ipc": ipc, "seed": seed}
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
        found = [f"paper={self.file}"]
        for key, value in (groups | dict(values)).items():
            if (key, value) == ("ipc", FULL):
                continue
            found += self._stand_ins.get(key, {}).get(value, [f"{key}={identity.spelt(value)}"])
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

    def keeps(self, row: str, dataset: str, ipc: str, student: str) -> bool:
        """Do the filters leave this cell, be it one that is only printed?"""
        cell = {"row": row, "dataset": dataset, "ipc": ipc, "student": student}
        return all(cell[k] in values for k, values in self._only.items() if k in cell)

    def _kept(self, job: Job) -> bool:
        if self.rehearsal and job.seed not in (0, 1):
            return False
        some = self.table.rehearsal if self.rehearsal else {}
        wanted = {key: [str(v) for v in values] for key, values in some.items()} | self._only
        return all(
            key == "student" or str(getattr(job, key)) in values for key, values in wanted.items()
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
            cfg = composed(*shared, name="reproduce")
            with open_dict(cfg):  # what is large and the same for all is not copied for every job
                cfg.paper_table = None
                cfg.hydra = {"runtime": {"choices": dict(choices(cfg))}}
            self._compositions[shared] = pickle.dumps(cfg, pickle.HIGHEST_PROTOCOL)
        cfg = pickle.loads(self._compositions[shared])  # in a quarter of the time of a copy
        for key, value in values.items():
            cfg[key] = int(value)
        return cfg

    @cached_property
    def _compositions(self) -> dict[tuple[str, ...], bytes]:
        return {}


def _filters(only: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    for key, values in only.items():
        checks.choice("the key of only.KEY=VALUE,…", key, _FILTERS)
        if not any(values):
            raise UserError(f"only.{key}: give values, such as only.ipc=10,20")
    return {key: list(values) for key, values in only.items()}


def _is_neutral(key: str) -> bool:
    """Does an override of this key leave every number as it is?"""
    return key in _NEUTRAL or (key.startswith("compute.") and key not in _ROUNDING)


def _without_folder(override: str) -> str:
    """An override as it means something elsewhere: of a whole path, the last name."""
    key, _, value = override.partition("=")
    return f"{key}={Path(value).name}" if value.startswith(("/", "~")) else override


def _stand_ins() -> dict[str, Any]:
    return plain(OmegaConf.load(Path(CONFIGS, "rehearsal.yaml")))

"""Sweeps: every combination of the comma-separated values, each different run once."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra_plugins.side_by_side import launch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgd3.config import identity
from mgd3.config.schema import choices, plain
from mgd3.runtime.errors import UserError
from mgd3.storage.files import write_atomic

log = logging.getLogger(__name__)

_RECORD = "multirun.yaml"  # Hydra's name for it
_TOLD_APART = (  # what by= of compare.py takes; the others are columns of its tables
    "backbone", "modes", "guidance", "start", "finetune", "features", "select", "pool", "sampler",
    "flip", "precision", "encoding_precision", "training_precision", "prompts", "refine",
    "surrogate",
)  # fmt: skip
_STUDENTS = ("students", "student_seeds", "first_student_seed")


class DistinctRuns(Sweeper):
    """Hydra's own sweep, but for combinations that some methods do not read.

    A key that the groups of a combination do not have, though another choice of the same group
    has it, is left out there; what is then the same run as another combination is made once.
    Both are said of what was typed. `params` are an experiment's own values.
    """

    hydra_context: HydraContext
    launcher: Launcher
    config: DictConfig

    def __init__(self, params: dict[str, Any]) -> None:
        self._params = params
        self._typed: set[str] = set()  # keys; what an experiment sweeps over needs no explanation
        self._of_choices: dict[tuple[str, ...], DictConfig] = {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Called by Hydra before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Sequence[Any]]:
        """Called by Hydra once. Raises `UserError`, and what the first failed run raised."""
        self._typed = {argument.partition("=")[0] for argument in arguments}
        given = [*(f"{key}={value}" for key, value in self._params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        jobs = self._distinct(self._readable(_combinations(parser.parse_overrides(given))))
        record = Path(self.config.hydra.sweep.dir, _RECORD)
        _refuse_foreign(record)
        if not self.config.get("plan"):  # a plan leaves nothing behind
            write_atomic(record, OmegaConf.to_yaml(self.config).encode())
        results = launch(self.launcher, jobs)
        for result in results:
            _ = result.return_value  # raises where the job failed
        done = [result.cfg for result in results if isinstance(result.cfg, DictConfig)]
        if len(done) > 1 and not done[0].get("plan"):
            log.info("%d runs are there%s", len(done), _what_next(jobs, done))
        return [results]

    def _readable(self, combinations: list[list[str]]) -> list[list[str]]:
        """Each combination without the keys that its groups do not have, but others have."""
        absent: dict[str, set[str]] = {}
        kept: set[str] = set()
        readable = []
        for combination in combinations:
            cfg, job = self._composed(self._choosing(combination)), []
            for override in combination:
                key, group = override.partition("=")[0], override.partition(".")[0]
                if _has(cfg, key) or not identity.choices_with(key):
                    job.append(override)
                    kept.add(key)
                else:
                    absent.setdefault(key, set()).add(f"{group}={choices(cfg)[group]}")
            readable.append(job)
        for key, without in absent.items():
            those = " and ".join(sorted(without))
            if key not in kept:
                raise UserError(
                    f"{key}: no run of this sweep has such a key ({those}); leave it out"
                )
            if key in self._typed:
                log.info("%s is left out of runs with %s, which have no such key", key, those)
        return readable

    def _composed(self, job: tuple[str, ...]) -> DictConfig:
        """The configuration of a job; Hydra composes once for each choice of groups."""
        loader, chosen = self.hydra_context.config_loader, self._choosing(job)
        values = [override for override in job if override not in chosen]
        if chosen not in self._of_choices:
            self._of_choices[chosen] = loader.load_sweep_config(self.config, list(chosen))
        cfg = deepcopy(self._of_choices[chosen])
        try:
            for override in OverridesParser.create(loader).parse_overrides(values):
                OmegaConf.update(cfg, override.get_key_element(), override.value(), merge=True)
        except OmegaConfBaseException:  # a key that is not there, or is only to be added
            return loader.load_sweep_config(self.config, list(job))
        return cfg

    def _choosing(self, job: Sequence[str]) -> tuple[str, ...]:
        """The overrides that choose among groups, such as method=random."""
        groups = choices(self.config)
        return tuple(override for override in job if override.partition("=")[0] in groups)

    def _distinct(self, jobs: list[list[str]]) -> list[list[str]]:
        """The jobs without those that are the same run as an earlier one."""
        first: dict[tuple[str, ...], list[str]] = {}
        same: dict[str, list[set[str]]] = {}
        for job in jobs:
            cfg = self._composed(tuple(job))
            run = _run(cfg) or tuple(job)
            if run in first:
                keys = {o.partition("=")[0] for o in set(job) ^ set(first[run])}
                if keys & self._typed:
                    same.setdefault(f"method={choices(cfg).get('method')}", []).append(keys)
            first.setdefault(run, job)
        for method, differing in same.items():
            log.info(
                "%s does not read %s: runs that differ in nothing else are made once (%d of %d "
                "combinations left out)",
                *(method, ", ".join(sorted(set().union(*differing))), len(differing), len(jobs)),
            )
        return list(first.values())


def _combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Lists of KEY=VALUE; of a key that is given twice the later values count."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if override.is_sweep_override():
            if not override.is_discrete_sweep():
                raise UserError(f"{override.input_line}: a sweep takes values or range(...) here")
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
    return [list(combination) for combination in product(*values.values())]


def _what_next(jobs: Sequence[Sequence[str]], done: Sequence[DictConfig]) -> str:
    """The command that sets scored runs side by side, told apart by what each method varied."""
    if not all(plain(cfg.get("students")) for cfg in done):
        return ""
    values: dict[tuple[str, str], set[str]] = {}
    for job in jobs:
        given = dict(override.split("=", 1) for override in job)
        for typed, value in given.items():
            key = typed.removeprefix("compute.")
            if key.partition(".")[0] in _TOLD_APART or key.startswith("protocol."):
                values.setdefault((given.get("method", ""), key), set()).add(value)
    keys = sorted({key for (_, key), several in values.items() if len(several) > 1})
    by = f" by=[{','.join(keys)}]" if keys else ""
    folders = sorted({shlex.quote(str(Path(cfg.runs, cfg.dataset.name))) for cfg in done})
    return f"; side by side: python scripts/compare.py {' '.join(folders)}{by}"


def _has(cfg: DictConfig, key: str) -> bool:
    """Is there such a dotted key, missing values counted?"""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, DictConfig) or part not in list(node):
            return False
        node = None if OmegaConf.is_missing(node, part) else node[part]
    return True


def _run(cfg: DictConfig) -> tuple[str, ...] | None:
    """What tells a run from others: its folder and its students; None where that is unknown."""
    try:
        folder = str(Path(cfg.hydra.sweep.dir, cfg.hydra.sweep.subdir))
        return (folder, *(str(plain(cfg.get(key))) for key in _STUDENTS))
    except (OmegaConfBaseException, UserError):
        return None  # the run itself will say what is wrong


def _refuse_foreign(record: Path) -> None:
    """`UserError` where the record of this sweep would take the place of a user's file."""
    try:
        text = record.read_text()
    except (OSError, UnicodeDecodeError):
        text = "hydra:" if not record.exists() else ""
    if "hydra:" not in text:
        raise UserError(
            f"{record} is not Hydra's, and a sweep would overwrite it: move it away, or give "
            "another folder with runs=FOLDER"
        )

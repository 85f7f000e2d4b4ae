"""Where the configuration lies and what its root holds. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.hardware import refuse_missing_gpu

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = str(ROOT / "configs")


def prepared(group: str, dataset: str) -> str:
    """What goes with a dataset in one group (configs/prepared.yaml)."""
    table = _prepared()
    return table.get(dataset, table["others"])[group]


@cache
def _prepared() -> dict[str, dict[str, str]]:
    return plain(OmegaConf.load(Path(CONFIGS, "prepared.yaml")))


def choices(cfg: DictConfig) -> Mapping[str, str]:
    """The choice of each group: of a composition that still has Hydra's node, or of this job."""
    node = cfg.get("hydra") if "hydra" in cfg else HydraConfig.get()
    return node.runtime.choices


def plain(node: Any) -> Any:
    """A config node as dicts, lists and scalars, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def find_plugins() -> None:
    """Let Hydra see our sweepers; it looks once, when it is first used."""
    folder = str(Path(__file__).parent / "plugins")
    if folder not in sys.path:
        sys.path.append(folder)


@contextmanager
def hydra_ready() -> Iterator[None]:
    """Hydra's state, made where there is none yet."""
    find_plugins()
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_dir(CONFIGS, version_base="1.3", job_name="run"):
        yield


def composed(*overrides: str, name: str = "config") -> DictConfig:
    """A configuration with Hydra's own node, from which `choices` are read."""
    with hydra_ready():
        return compose(name, list(overrides), return_hydra_config=True)


def validate(cfg: DictConfig) -> None:
    """Root keys and values that no constructor sees, and what needs no torch to be refused."""
    minimum = {"ipc": 1, "seed": 0, "student_seeds": 1, "first_student_seed": 0, "pool": 1}
    for key, least in minimum.items():
        if key in cfg:
            checks.integer(key, cfg[key], minimum=least)
    if cfg.get("report") is not None:
        checks.flag("report", cfg.report)
    if not isinstance(cfg.get("plan"), str):  # which is for another machine
        refuse_missing_gpu(cfg.compute.device)


def refuse_unknown(cfg: DictConfig) -> None:
    """`UserError` for a root key that run.py has not, as `+key=value` would add it."""
    known = set(_root_keys())
    for key in cfg:
        if key != "hydra":
            checks.choice("a root key", key, sorted(known))


@cache
def _root_keys() -> tuple[str, ...]:
    return tuple(str(key) for key in composed() if key != "hydra")


def student_names(cfg: DictConfig) -> list[str]:
    """`students` as a list; one name may stand alone, none trains nothing."""
    students = plain(cfg.students)
    names = [students] if isinstance(students, str) else students
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError(f"students={students!r} must be a name or a list of names")
    return list(dict.fromkeys(names))


def student_seeds(cfg: DictConfig) -> range:
    """The seeds of the students that a run trains on each set."""
    return range(cfg.first_student_seed, cfg.first_student_seed + cfg.student_seeds)

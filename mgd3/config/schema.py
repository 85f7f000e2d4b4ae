"""The one place, besides the scripts, that knows Hydra: root schema, identity, error messages."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mgd3.runtime import checks
from mgd3.runtime.errors import CorruptFileError, UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = str(ROOT / "configs")

# What makes the images; two runs that agree on these share one distilled dataset.
DISTILLATION_KEYS = (
    "dataset", "backbone", "method", "modes", "guidance", "start", "finetune", "features",
    "sampler", "select", "pool", "precision", "flip", "ipc", "seed",
)  # fmt: skip
# What makes a score, given the images and a student: one folder holds all students' scores.
EVALUATION_KEYS = ("protocol",)
# What all seeds of one table cell share.
CELL_KEYS = (*(key for key in DISTILLATION_KEYS if key != "seed"), "protocol")


@dataclass
class RunConfig:
    """Root keys and their types; groups are checked by the constructors that they name."""

    dataset: Any = MISSING
    backbone: Any = MISSING
    method: Any = MISSING
    modes: Any = MISSING
    guidance: Any = MISSING
    start: Any = MISSING
    finetune: Any = MISSING
    features: Any = MISSING
    select: Any = MISSING
    sampler: Any = MISSING
    protocol: Any = MISSING
    tracker: Any = MISSING
    students: Any = MISSING
    ipc: int = MISSING
    seed: int = MISSING
    student_seeds: int = MISSING
    first_student_seed: int = MISSING
    parallel: str = MISSING
    pool: int = MISSING
    flip: str = MISSING
    precision: str = MISSING
    batch_size: Any = MISSING  # a number, or «auto»
    device: str = MISSING
    compile: bool = MISSING
    channels_last: bool = MISSING
    vae_slicing: bool = MISSING
    workers: int = MISSING
    cache: str = MISSING
    runs: str = MISSING
    report: bool = MISSING
    folder: str = MISSING
    table: Any = None  # set by experiment files of the paper alone
    train: Any = None  # set by scripts/train_backbone.py alone
    images: Any = None  # set by scripts/evaluate.py and scripts/measure.py alone
    title: Any = None  # set by scripts/evaluate.py alone
    metrics: Any = MISSING
    by: Any = None  # this and the next: set by scripts/measure.py alone
    redundancy: Any = None


def register() -> None:
    """Make the schemas and resolvers known to Hydra; call before `hydra.main` runs."""
    ConfigStore.instance().store(name="run_schema", node=RunConfig)
    OmegaConf.register_new_resolver(
        "distill_id", lambda *, _root_: identity(_root_, DISTILLATION_KEYS), replace=True
    )
    OmegaConf.register_new_resolver(
        "run_id",
        lambda *, _root_: identity(_root_, DISTILLATION_KEYS + EVALUATION_KEYS),
        replace=True,
    )


def identity(cfg: DictConfig, keys: tuple[str, ...]) -> str:
    """Eight hex digits of the resolved values of `keys`."""
    return values_digest({key: part_of_identity(cfg, key) for key in keys})


def part_of_identity(cfg: DictConfig, key: str) -> Any:
    """A key's plain value; of the dataset without what other groups have taken from it."""
    value = plain(cfg[key])
    if key == "dataset":
        return {k: v for k, v in value.items() if k not in ("training", "mirror")}
    return value


def values_digest(values: Mapping[str, Any]) -> str:
    """Eight hex digits of plain values by key."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2s(text.encode(), digest_size=4).hexdigest()


def plain(node: Any) -> Any:
    """A config node as dicts, lists and scalars, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def validate(cfg: DictConfig) -> None:
    """Root keys and values that no constructor sees."""
    known = [f.name for f in fields(RunConfig)]
    for key in cfg:
        checks.choice("a root key", key, known)
    checks.integer("ipc", cfg.ipc, minimum=1)
    checks.integer("seed", cfg.seed, minimum=0)
    checks.integer("student_seeds", cfg.student_seeds, minimum=1)
    checks.integer("first_student_seed", cfg.first_student_seed, minimum=0)
    checks.integer("pool", cfg.pool, minimum=1)


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


@contextmanager
def errors_for_people() -> Iterator[None]:
    """Print what a user can mend in one paragraph, exit with 1; a bug shows its traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra swallows the exception's type
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except CorruptFileError as error:
        _exit(f"{error}; delete it and run the same command to make it again")
    except (HydraException, OmegaConfBaseException) as error:
        _exit(explained(error))
    except OSError as error:
        if not _raised_by_hydra(error):
            raise
        _exit(f"hydra.run.dir: cannot make {error.filename}: {error.strerror}; choose another")
    except KeyboardInterrupt:
        _exit("interrupted; the same command goes on where this one stopped", status=130)


def explained(error: Exception) -> str:
    """Hydra's message; where a key is unknown, with the allowed ones and the closest."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(parent, DictConfig):
        options = sorted(str(k) for k in parent if k != "_target_")
        close = difflib.get_close_matches(str(cause.key), options, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        return f"{key} is not a key of this configuration.{hint} Allowed: {', '.join(options)}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{key}: {cause.msg or cause}".splitlines()[0]
    return str(error).split("Config search path")[0].strip()


def _raised_by_hydra(error: OSError) -> bool:
    """Did Hydra fail to make the run's folder, rather than one of our own files?"""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    known = [f for f in files if "site-packages" in f or f.startswith(str(ROOT))]
    return f"{os.sep}hydra{os.sep}" in known[-1].removeprefix(str(ROOT))


def _exit(message: str, status: int = 1) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)

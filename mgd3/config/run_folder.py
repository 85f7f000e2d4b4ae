"""The folder that Hydra gives a run: nobody else's is written into, and it says how it was made.

Hydra makes the folder before anything of ours runs, but writes nothing there (`output_subdir:
null`, and a log file that opens with its first line): what it would write comes from here, once
the folder is known to be free or this run's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mgd3.config.schema import ROOT
from mgd3.data.claims import OF_SCORES, OF_SET, read_claim
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.machine import CHECKOUT, keep_freed_memory, make_deterministic
from mgd3.storage.files import (
    RUN_LOCK,
    nothing_left_behind,
    remove_leftovers,
    write_atomic,
    writing,
)

log = logging.getLogger(__name__)

RECORD = ".hydra"
_NAMED = 3


def refuse_foreign(folder: Path, claims: bool) -> None:
    """`UserError` unless `folder` is empty, or the beginning of a run of ours.

    With `claims`, it may also be a run that says what it was made from, which is compared later.
    """
    here = folder.resolve()
    if here in (Path.cwd(), ROOT) or here in ROOT.parents:
        raise UserError(
            f"hydra.run.dir={folder} is no folder for a run: it holds the project or is where you "
            "are; leave it out, or give a new one"
        )
    inside = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for claim in inside & {OF_SET, OF_SCORES} if claims else ():
        read_claim(folder / claim, "choose another hydra.run.dir")
        return
    others = {name for name in inside if not (name.startswith(".") or name.endswith(".log"))}
    if others or (inside and RUN_LOCK not in inside):
        named = sorted(others or inside)
        raise UserError(
            f"hydra.run.dir={folder} is not empty and no run of this project (it holds "
            f"{', '.join(named[:_NAMED])}{' …' if len(named) > _NAMED else ''}): nothing is "
            "written there; give an empty or a new folder"
        )


@contextmanager
def begun(cfg: DictConfig, claims: bool = False) -> Iterator[Path]:
    """The run's folder, for what is checked before any work; a refusal leaves it as it was.

    `claims`: it may be a finished run's own (`refuse_foreign`).

    The process is set up as `compute` says, and what killed runs left in the cache is cleared.
    A sweep whose project has moved to another commit meanwhile says so.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    for key in ("cache", "runs"):
        if not isinstance(cfg.get(key, "."), str) or not cfg.get(key, "."):
            raise UserError(f"{key}={cfg[key]!r} is no folder; give one, or leave {key} out")
    refuse_foreign(folder, claims)
    if now := CHECKOUT.moved():
        log.warning(
            "the project is at commit %s now; the code that runs is of %s, as rows say, with "
            "configuration files as they are now: if that fails, start the same command again",
            *(now, CHECKOUT.commit),
        )
    with nothing_left_behind(folder, Path(cfg.get("runs", "."))):
        with writing(folder):
            (folder / RUN_LOCK).touch()  # from now on it is a run's
        keep_freed_memory()
        make_deterministic(checks.flag("compute.deterministic", cfg.compute.deterministic))
        yield folder
    remove_leftovers(Path(cfg.cache), *folder.parent.glob(f"*/{RECORD}"))


def record(folder: Path, cfg: DictConfig) -> None:
    """Write the configuration, Hydra's own and the overrides, as Hydra names them."""
    job: Any = HydraConfig.instance().cfg
    parts = {"config": cfg, "hydra": job, "overrides": job.hydra.overrides.task}
    for name, part in parts.items():
        write_atomic(folder / RECORD / f"{name}.yaml", OmegaConf.to_yaml(part).encode())

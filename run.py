"""Distil one dataset at one IPC, train students on it from scratch, report their accuracy.

python run.py dataset=imagenette ipc=10        the paper's setting
python run.py                                  embedded digits, on any machine
"""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mgd3.config.schema import CONFIGS, refuse_unknown, validate
from mgd3.runtime.checks import flag
from mgd3.runtime.errors import UserError
from mgd3.runtime.screen import tell
from mgd3.storage.files import nothing_left_behind, remove_empty

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> None:
    """One dataset, method, IPC and seed; a sweep goes on where one of them fails."""
    in_sweep = not OmegaConf.is_missing(HydraConfig.get().job, "num")
    try:
        with nothing_left_behind(_folder(), Path(cfg.runs)):
            validate(cfg)
            machine = cfg.plan if isinstance(cfg.plan, str) else None
            only_planned = machine is None and flag("plan", cfg.plan)
        if machine is not None:
            from scripts.machine_plan import print_machine_plan

            try:
                print_machine_plan(cfg, machine)
            finally:
                remove_empty(_folder())
        elif only_planned:
            from scripts.run_plan import print_plan  # torch and all that it takes

            print_plan(cfg, one=not in_sweep)
        else:
            from scripts.run_cell import run_cell

            run_cell(cfg, show=not in_sweep)
        tell(_name(cfg))
    except Exception as error:
        tell(_name(cfg), str(error))
        if in_sweep:  # Hydra goes on, and tells of the first failure alone
            log.error("failed: %s", error, exc_info=not isinstance(error, UserError))
            let_go(error)  # Hydra keeps the error, and with it networks and images
        raise


def _folder() -> Path:
    """What Hydra has made for this run."""
    return Path(HydraConfig.get().runtime.output_dir)


def _name(cfg: DictConfig) -> str:
    """A run in a few words."""
    return f"{cfg.method.get('name')}, seed {cfg.seed}"


def let_go(error: BaseException | None) -> None:
    """Forget the local variables of the calls that an error came through."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="config")
def main(cfg: DictConfig) -> None:
    """Refuse what is no key, then run."""
    with nothing_left_behind(_folder(), Path(cfg.runs)):
        refuse_unknown(cfg)
    run(cfg)


if __name__ == "__main__":
    command(main)

"""Fetch a dataset's public archive to where runs look for it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig

from mgd3.config.schema import CONFIGS
from mgd3.data.layouts.archives import data_folder, fetch_archive

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="fetch_data")
def main(cfg: DictConfig) -> None:
    """Fetch, check, unpack; do nothing where it is there."""
    log.info("%s: %s", cfg.name, fetch_archive(str(cfg.name), data_folder(cfg.data), cfg.md5))


if __name__ == "__main__":
    command(main)

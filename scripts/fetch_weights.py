"""Fetch a backbone's weights to where a run looks for them.

A broken download goes on where it stopped; sizes and checksums are verified where they are
published.
"""

from __future__ import annotations

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

from mgd3.backbones.weights.download import PARTS, fetch_repository, sources_of
from mgd3.backbones.weights.sources import find_file
from mgd3.config.schema import CONFIGS, plain
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.storage.fetched import download_folder, download_path, is_url
from mgd3.storage.files import remove_leftovers
from mgd3.storage.transfers import fetch_url, trust


def sources(cfg: DictConfig) -> dict[str, list[str]]:
    """What was asked for, with the pipeline folders that are needed of each repository."""
    backbone = cfg.get("backbone")
    if cfg.source is not None and backbone is not None:
        raise UserError("backbone and source are two: fetch one after the other")
    if cfg.source is not None:
        checksum = "" if cfg.sha256 is None else f"#sha256={cfg.sha256}"
        return {f"{cfg.source}{checksum}": list(PARTS)}
    options = plain(backbone)
    if options.get("weights") == "???":
        print("this backbone's weights are your own, made by scripts/train_backbone.py")
    return sources_of(options)


def fetch(source: str, parts: list[str], insecure: bool = False) -> Path:
    """The local path of a source, fetched unless it is there."""
    if is_url(source):
        from mgd3.storage.checkpoints import read_weights  # imports torch

        path = download_path(source)
        is_new = not path.is_file()
        fetch_url(source, path, insecure=insecure)
        try:
            read_weights("fetched", path)
        except UserError:
            if is_new:
                path.unlink()
            raise
        trust(source, path)
        return path
    local = find_file("weights", source) or Path(source).expanduser()
    if local.exists():
        return local
    if source.count("/") != 1:
        raise UserError(f"{source} is neither here nor a hub id (org/name) nor an https address")
    return fetch_repository(source, parts)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="fetch_weights")
def main(cfg: DictConfig) -> None:
    """Fetch everything that the arguments name."""
    remove_leftovers(download_folder())
    wanted = sources(cfg)
    for source, parts in wanted.items():
        print(f"{source}: {fetch(source, parts, checks.flag('insecure', cfg.insecure))}")
    if not wanted:
        print("this backbone needs no weights")


if __name__ == "__main__":
    command(main)

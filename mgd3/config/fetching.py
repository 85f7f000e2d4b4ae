"""What a run needs that is not on this machine: announced with sizes, then fetched."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from mgd3.config import identity
from mgd3.config.schema import choices, plain
from mgd3.data.layouts.archives import ARCHIVES, data_folder, fetch_archive, find_archive, may_fetch
from mgd3.runtime.errors import UserError
from mgd3.storage.fetched import download_path, is_url
from mgd3.storage.repositories import hub_reachable

log = logging.getLogger(__name__)

_KEYS = ("weights", "vae", "finetuning_vae")  # of a backbone that name something to be fetched


@dataclass(frozen=True)
class Need:
    """Something to be fetched."""

    name: str
    key: str  # that asks for it
    size: float  # in bytes
    fetch: Callable[[], Path]

    def __str__(self) -> str:
        return f"{self.name} ({self.key}), {_amount(self.size)}"


def announce(cfg: DictConfig) -> list[Need]:
    """What must be fetched of the dataset's archive and the backbone's weights, said with sizes.

    What cannot be fetched now is not among it: see `out_of_reach`.
    """
    needs = needed(cfg)
    if needs:
        total = _amount(sum(n.size for n in needs))
        log.info("to be fetched first, %s in all: %s", total, "; ".join(map(str, needs)))
    return needs


def needed(cfg: DictConfig) -> list[Need]:
    """What must be fetched first."""
    return [*_archive(cfg), *needed_weights(cfg)]


def out_of_reach(cfg: DictConfig) -> list[UserError]:
    """For each of the backbone's weights that is neither here nor fetched by a run, what to do."""
    sources = _sources(cfg)
    if not sources:
        return []
    from mgd3.backbones.weights.sources import NO_HUB, missing

    found = [
        missing(key, source, f"{download_path(source)} does not exist")
        for source, (key, _) in sources.items()
        if is_url(source) and not download_path(source).is_file()
    ]
    wanted = _repositories(cfg)
    if wanted and not hub_reachable():
        found += [missing(key, source, NO_HUB) for source, (key, _) in wanted.items()]
    return found


def fetch(needs: Sequence[Need]) -> None:
    """Fetch what was announced, unless somebody has done so since."""
    for need in needs:
        need.fetch()


def _archive(cfg: DictConfig) -> list[Need]:
    dataset = cfg.dataset
    name = dataset.get("archive")
    if name not in ARCHIVES or dataset.get("root") is not None or not dataset.get("download"):
        return []
    place = data_folder(cfg.data)
    if find_archive(name, place) is not None or not may_fetch():
        return []
    archive = ARCHIVES[name]
    return [
        Need(
            name=f"{archive.name}.tgz",
            key="dataset",
            size=archive.gigabytes * 1e9,
            fetch=partial(fetch_archive, name, place),
        )
    ]


def needed_weights(cfg: DictConfig) -> list[Need]:
    """The hub's repositories that the backbone needs and that can be fetched now."""
    wanted = _repositories(cfg)
    if not wanted or not hub_reachable():
        return []
    from mgd3.backbones.weights.download import fetch_repository, wanted_files

    return [
        Need(
            name=source,
            key=key,
            size=float(sum(file.size for file in wanted_files(source, parts))),
            fetch=partial(fetch_repository, source, parts),
        )
        for source, (key, parts) in wanted.items()
    ]


def _repositories(cfg: DictConfig) -> dict[str, tuple[str, list[str]]]:
    """Those of `_sources` that are the hub's and not here."""
    sources = _sources(cfg)
    if not sources:
        return {}
    from mgd3.backbones.weights.download import cached_repository
    from mgd3.backbones.weights.sources import is_hub_id

    return {
        source: (key, parts)
        for source, (key, parts) in sources.items()
        if is_hub_id(source) and cached_repository(source, parts) is None
    }


def _sources(cfg: DictConfig) -> dict[str, tuple[str, list[str]]]:
    """What the backbone names as weights: of each the key that does, and the parts it reads."""
    if "backbone" not in identity.reads(cfg):
        return {}
    from mgd3.backbones.weights.download import sources_of  # takes torch

    finetuned = choices(cfg).get("finetune") != "none"
    return {
        source: (next(f"backbone.{k}" for k in _KEYS if str(cfg.backbone.get(k)) == source), parts)
        for source, parts in sources_of(plain(cfg.backbone), finetuned).items()
    }


def _amount(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

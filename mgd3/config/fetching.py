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

    What cannot be fetched is left to the part that reads it, whose message says what is missing.
    """
    needs = needed(cfg)
    if needs:
        total = _amount(sum(n.size for n in needs))
        log.info("to be fetched first, %s in all: %s", total, "; ".join(map(str, needs)))
    return needs


def needed(cfg: DictConfig) -> list[Need]:
    """What must be fetched first."""
    return [*_archive(cfg), *_weights(cfg)]


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


def _weights(cfg: DictConfig) -> list[Need]:
    if "backbone" not in identity.reads(cfg):
        return []
    from mgd3.backbones.weights.download import (
        cached_repository,
        fetch_repository,
        sources_of,
        wanted_files,
    )
    from mgd3.backbones.weights.sources import is_hub_id  # takes torch

    needs = []
    finetuned = choices(cfg).get("finetune") != "none"
    for source, parts in sources_of(plain(cfg.backbone), finetuned).items():
        if not is_hub_id(source) or cached_repository(source, parts) is not None:
            continue
        if hub_reachable():
            size = float(sum(file.size for file in wanted_files(source, parts)))
            key = next(k for k in _KEYS if str(cfg.backbone.get(k)) == source)
            needs.append(
                Need(source, f"backbone.{key}", size, partial(fetch_repository, source, parts))
            )
    return needs


def _amount(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"

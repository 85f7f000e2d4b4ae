"""Mode discovery of a whole dataset, class by class: encode, cluster, save."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from mgd3 import checks
from mgd3.artifacts import CorruptFileError
from mgd3.datasets import RealDataset, RealImage
from mgd3.inventory import take_inventory
from mgd3.latents import LatentCache
from mgd3.modes import load_modes, save_modes
from mgd3.timing import StageTimes
from mgd3.types import Codec, ModeFinder, Modes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Work:
    """How work is done; nothing here changes a result but `flip`."""

    cache: Path  # latents and inventories, shared by all runs
    batch_size: int | str  # images sampled at once, or «auto»
    workers: int  # threads that decode files
    flip: str  # «none», or «random» as in the released loader

    def __post_init__(self) -> None:
        if self.batch_size != "auto":
            checks.integer("batch_size (or auto)", self.batch_size, minimum=1)
        checks.integer("workers", self.workers, minimum=1)
        checks.choice("flip", self.flip, ["none", "random"])


@dataclass(frozen=True, kw_only=True)
class ClassModes:
    """A class's modes and, for each, the real image nearest to it."""

    modes: Modes
    nearest: list[RealImage]


def discover_modes(
    dataset: RealDataset, codec: Codec, finder: ModeFinder, ipc: int, work: Work, out: Path
) -> dict[str, ClassModes]:
    """Modes by wnid, K = ipc; each class's are kept in `out`/modes/<wnid>.safetensors."""
    folder, times = out / "modes", StageTimes(out / "times.json")
    with times.stage("check"):
        inventory = take_inventory(dataset, "train", ipc, work.cache, work.workers)
    latents = LatentCache(work.cache / "latents", codec, work.flip)
    found = {}
    for info, images in zip(dataset.classes, inventory, strict=True):
        path = folder / f"{info.wnid}.safetensors"
        key = latents.key(info, images)
        modes = _saved(path, key)
        if modes is None:
            with times.stage("encode"):
                real = latents.latents(info, images)
            with times.stage("modes"):
                modes = finder(real, ipc)
            nearest_keys = [images.images[i].key for i in modes.nearest]
            save_modes(path, modes, key, nearest_keys)
        found[info.wnid] = ClassModes(
            modes=modes, nearest=[images.images[i] for i in modes.nearest]
        )
    log.info("modes: %d classes x %d in %s", len(found), ipc, folder)
    return found


def _saved(path: Path, latents: str) -> Modes | None:
    """A finished class's modes; None if there are none, or they are of other latents."""
    if not path.is_file():
        return None
    try:
        return load_modes(path, latents)
    except CorruptFileError as error:
        log.warning("%s; finding the modes again", error)
        return None

"""Mode discovery of a whole dataset, class by class: encode, cluster, save."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from threadpoolctl import threadpool_limits
from torch import Tensor

from mgd3 import checks
from mgd3.artifacts import CorruptFileError
from mgd3.datasets import RealDataset, RealImage
from mgd3.inventory import ClassImages, take_inventory
from mgd3.latents import LatentCache
from mgd3.modes import load_modes, save_modes
from mgd3.ranks import Ranks
from mgd3.timing import StageTimes
from mgd3.types import Codec, ModeFinder, Modes, Target

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
    latents: Callable[[], Tensor]  # reads what was clustered, (N, C, h, w), from the cache

    def target(self, image: int) -> Target:
        """What the class's image (or candidate) number `image` is steered to."""
        index = image % len(self.modes.centers)
        return Target(modes=self.modes, index=index, latents=self.latents)


def cluster(finder: ModeFinder, latents: Tensor, num_modes: int) -> Modes:
    """Modes of one class on one thread: several would sum in the order in which they finish.

    The limit is the calling thread's own, so encoding beside it keeps all of them.
    """
    with threadpool_limits(1, user_api="openmp"):
        return finder(latents, num_modes)


def discover_modes(
    dataset: RealDataset,
    codec: Codec,
    finder: ModeFinder,
    ipc: int,
    work: Work,
    out: Path,
    ranks: Ranks | None = None,
) -> dict[str, ClassModes]:
    """Modes by wnid, K = ipc; each class's are kept in `out`/modes/<wnid>.safetensors.

    Up to `work.workers` classes are clustered at once while the next one is encoded; no more than
    their latents are held. What a finder found for some latents is kept in `work.cache` too, where
    runs of other seeds, backbone weights or guidance find it. Several processes (`ranks`) take
    turns at the classes.
    """
    ranks = ranks or Ranks()
    folder, times = out / "modes", StageTimes(out / "times.json", keep=ranks.first)
    digest = _finder_digest(finder)
    shared = None if digest is None else work.cache / "modes" / f"{digest}-k{ipc}"
    with times.stage("check"):
        inventory = ranks.in_turn(
            lambda: take_inventory(dataset, "train", ipc, work.cache, work.workers)
        )
    latents = LatentCache(work.cache / "latents", codec, work.flip)
    found: dict[str, Modes] = {}
    running: dict[str, Future[Modes]] = {}

    def finish(wnid: str, images: ClassImages, key: str) -> None:
        with times.stage("modes"):
            found[wnid] = running.pop(wnid).result()
        if shared is not None:
            keep(wnid, images, key, shared / f"{key}.safetensors")
        keep(wnid, images, key, folder / f"{wnid}.safetensors")

    def keep(wnid: str, images: ClassImages, key: str, file: Path) -> None:
        nearest = [images.images[i].key for i in found[wnid].nearest]
        save_modes(file, found[wnid], key, nearest)

    with ThreadPoolExecutor(work.workers) as pool:
        waiting: list[tuple[str, ClassImages, str]] = []
        for label, (info, images) in enumerate(zip(dataset.classes, inventory, strict=True)):
            if not ranks.mine(label):
                continue
            key, own = latents.key(info, images), folder / f"{info.wnid}.safetensors"
            if (modes := _saved(own, key)) is not None:
                found[info.wnid] = modes
                continue
            if shared and (modes := _saved(shared / f"{key}.safetensors", key)) is not None:
                found[info.wnid] = modes
                keep(info.wnid, images, key, own)
                continue
            with times.stage("encode"):
                real = latents.latents(info, images)
            running[info.wnid] = pool.submit(cluster, finder, real, ipc)
            waiting.append((info.wnid, images, key))
            if len(waiting) >= work.workers:
                finish(*waiting.pop(0))
        for one in waiting:
            finish(*one)
    ranks.wait()
    for info, images in zip(dataset.classes, inventory, strict=True):
        if info.wnid not in found:  # another process's
            path = folder / f"{info.wnid}.safetensors"
            found[info.wnid] = load_modes(path, latents.key(info, images))
    log.info("modes: %d classes x %d in %s", len(found), ipc, folder)
    return {
        info.wnid: ClassModes(
            modes=found[info.wnid],
            nearest=[images.images[i] for i in found[info.wnid].nearest],
            latents=partial(latents.latents, info, images),
        )
        for info, images in zip(dataset.classes, inventory, strict=True)
    }


def _finder_digest(finder: ModeFinder) -> str | None:
    """Identifies what a finder finds: its class, the file that holds its code, its settings.

    None for one that cannot be told from others: a bare function, or a class typed in by hand.
    """
    kind = type(finder)
    module = inspect.getmodule(kind)
    try:
        code = inspect.getsource(module) if module else None
    except (OSError, TypeError):
        code = None
    if code is None or not hasattr(finder, "__dict__"):
        return None
    settings = json.dumps(vars(finder), sort_keys=True, default=repr)
    text = "\n".join([kind.__qualname__, settings, code])
    return hashlib.blake2s(text.encode(), digest_size=6).hexdigest()


def _saved(path: Path, latents: str) -> Modes | None:
    """A finished class's modes; None if there are none, or they are of other latents."""
    if not path.is_file():
        return None
    try:
        return load_modes(path, latents)
    except CorruptFileError as error:
        log.warning("%s; finding the modes again", error)
        return None

"""Mode discovery of a whole dataset, class by class: encode, cluster, keep."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from threadpoolctl import threadpool_limits
from torch import Tensor

from mgd3.backbones.contract import Codec
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset, RealImage
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.modes.finders import ModeFinder, Modes
from mgd3.modes.latents import LatentCache
from mgd3.runtime.compute import Work
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import CorruptFileError, reading
from mgd3.storage.cache import cached, found
from mgd3.storage.tensors import load_tensors, save_tensors
from mgd3.storage.timing import StageTimes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ClassModes:
    """A class's modes and, for each, the real image nearest to it."""

    modes: Modes
    nearest: list[RealImage]
    latents: Callable[[], Tensor]  # reads what was clustered, (N, C, h, w), from the cache


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

    Several processes (`ranks`) take turns at the classes.
    """
    ranks = ranks or Ranks()
    times = StageTimes(out / "times.json", keep=ranks.first)
    with times.stage("check"):
        inventory = ranks.in_turn(
            lambda: take_inventory(dataset, "train", ipc, work.cache, work.workers)
        )
    latents = LatentCache(work.cache / "latents", codec, work.flip)
    shelf = _Shelf(latents, finder, ipc, own=out / "modes", shared=work.cache / "modes")
    classes = list(zip(dataset.classes, inventory, strict=True))
    shelf.fill((pair for n, pair in enumerate(classes) if ranks.mine(n)), work.workers, times)
    ranks.wait()
    log.info("modes: %d classes x %d in %s", len(classes), ipc, out / "modes")
    return {info.wnid: shelf.take(info, images) for info, images in classes}


def cluster(finder: ModeFinder, latents: Tensor, num_modes: int) -> Modes:
    """Modes of one class on one thread: several would sum in the order in which they finish.

    The limit is the calling thread's own, so encoding beside it keeps all of them.
    """
    with threadpool_limits(1, user_api="openmp"):
        return finder(latents, num_modes)


class _Shelf:
    """Modes by class: in the run's folder and, for runs of other seeds, in the cache."""

    def __init__(
        self, latents: LatentCache, finder: ModeFinder, ipc: int, own: Path, shared: Path
    ) -> None:
        self._latents, self._finder, self._ipc, self._own = latents, finder, ipc, own
        digest = finder_digest(finder)
        self._shared = None if digest is None else shared / f"{digest}-k{ipc}"

    def fill(
        self, classes: Iterable[tuple[ClassInfo, ClassImages]], workers: int, times: StageTimes
    ) -> None:
        """Find the modes that are missing.

        Up to `workers` classes are clustered at once while the next one is encoded; no more than
        their latents are held.
        """
        running: deque[Future[Modes]] = deque()
        with ThreadPoolExecutor(workers) as pool:
            for info, images in classes:
                if self._kept(info, images) is not None:
                    continue
                with times.stage("encode"):
                    real = self._latents.latents(info, images)
                running.append(pool.submit(self._find, info, images, real))
                if len(running) >= workers:
                    with times.stage("modes"):
                        running.popleft().result()
            with times.stage("modes"):
                while running:
                    running.popleft().result()

    def take(self, info: ClassInfo, images: ClassImages) -> ClassModes:
        """One class's modes, which are there."""
        modes = self._kept(info, images)
        assert modes is not None, "filled before"
        return ClassModes(
            modes=modes,
            nearest=[images.images[i] for i in modes.nearest],
            latents=partial(self._latents.latents, info, images),
        )

    def _kept(self, info: ClassInfo, images: ClassImages) -> Modes | None:
        """Modes that this run or, in the cache, another one has found."""
        key, format_ = self._key(info, images), ModeFile(images)
        own = found(self._path(info), key, format_)
        if own is None and self._shared is not None:
            shared = found(self._shared / f"{key['latents']}.safetensors", key, format_)
            if shared is not None:
                return format_.write(self._path(info), shared, key)
        return own

    def _find(self, info: ClassInfo, images: ClassImages, latents: Tensor) -> Modes:
        key, format_ = self._key(info, images), ModeFile(images)

        def make() -> Modes:
            return cluster(self._finder, latents, self._ipc)

        if self._shared is None:
            modes = make()
        else:
            modes = cached(self._shared / f"{key['latents']}.safetensors", key, make, format_)
        return format_.write(self._path(info), modes, key)  # the set is this run's alone

    def _path(self, info: ClassInfo) -> Path:
        return self._own / f"{info.wnid}.safetensors"

    def _key(self, info: ClassInfo, images: ClassImages) -> dict[str, str]:
        return {"latents": self._latents.key(info, images)}


@dataclass(frozen=True)
class ModeFile:
    """Modes in a safetensors file that also names the real image next to each."""

    images: ClassImages | None = None  # None: only to read

    def read(self, path: Path, key: Mapping[str, str]) -> Modes:
        """Modes; `CorruptFileError` if the file is damaged or of other latents."""
        tensors = load_tensors(path, dict(key))
        with reading(path, "it holds no modes", CorruptFileError):
            return _checked(Modes(**tensors))

    def write(self, path: Path, value: Modes, key: Mapping[str, str]) -> Modes:
        """`value` itself."""
        assert self.images is not None
        nearest = [self.images.images[i].key for i in value.nearest]
        save_tensors(path, vars(value), {**key, "nearest": json.dumps(nearest)})
        return value


def _checked(modes: Modes) -> Modes:
    """Modes whose tensors go together; `ValueError` for others."""
    count = len(modes.centers) if modes.centers.ndim == 4 else 0
    if count == 0 or not len(modes.counts) == len(modes.nearest) == count:
        raise ValueError("its tensors are no modes")
    return modes


def finder_digest(finder: ModeFinder) -> str | None:
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

"""Mode discovery of a whole dataset, class by class: encode, cluster, keep."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from mgd3.runtime.errors import CorruptFileError, UserError, reading
from mgd3.runtime.progress import progress
from mgd3.runtime.stages import Stage, announce
from mgd3.storage.cache import cached, found
from mgd3.storage.tensors import load_tensors, save_tensors, tensors_digest
from mgd3.storage.timing import StageTimes, WorkPace


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
    shelf = _shelf(codec, finder, ipc, work, out)
    classes = list(zip(dataset.classes, inventory, strict=True))
    _refuse_small(finder, ipc, classes)
    shelf.fill([pair for n, pair in enumerate(classes) if ranks.mine(n)], work.workers, times)
    ranks.wait()
    return {info.wnid: shelf.take(info, images) for info, images in classes}


def mode_stages(
    codec: Codec,
    finder: ModeFinder,
    ipc: int,
    work: Work,
    out: Path,
    classes: Sequence[tuple[ClassInfo, ClassImages]],
) -> list[Stage]:
    """What `discover_modes` would do."""
    _refuse_small(finder, ipc, classes)
    shelf = _shelf(codec, finder, ipc, work, out)
    missing = [pair for pair in classes if not shelf.has(*pair)]
    return [
        LatentCache(work.cache / "latents", codec, work.flip).stage(missing),
        shelf.stage(missing),
    ]


def _refuse_small(
    finder: ModeFinder, ipc: int, classes: Sequence[tuple[ClassInfo, ClassImages]]
) -> None:
    """`UserError` for a class that has too few images for this finder."""
    shortfall = getattr(finder, "shortfall", None)
    if shortfall is None:
        return
    for info, images in classes:
        count = len(images.images)
        if why := shortfall(count, ipc):
            raise UserError(
                f"class {info.wnid} ({info.name}) has {count} usable training images, {why}"
            )


def _shelf(codec: Codec, finder: ModeFinder, ipc: int, work: Work, out: Path) -> _Shelf:
    latents = LatentCache(work.cache / "latents", codec, work.flip, work.workers)
    pace = WorkPace(
        work.cache, f"{ipc} modes of a class by {type(finder).__name__}", torch.device("cpu")
    )
    return _Shelf(latents, finder, ipc, out / "modes", work.cache / "modes", pace)


def cluster(finder: ModeFinder, latents: Tensor, num_modes: int) -> Modes:
    """Modes of one class on one thread: several would sum in the order in which they finish.

    The limit is the calling thread's own, so encoding beside it keeps all of them.
    """
    with threadpool_limits(1, user_api="openmp"):
        return finder(latents, num_modes)


class _Shelf:
    """Modes by class: in the run's folder and, for runs of other seeds, in the cache."""

    def __init__(
        self,
        latents: LatentCache,
        finder: ModeFinder,
        ipc: int,
        own: Path,
        shared: Path,
        pace: WorkPace,
    ) -> None:
        self._latents, self._finder, self._ipc, self._own = latents, finder, ipc, own
        digest = finder_digest(finder)
        self._shared = None if digest is None else shared / f"{digest}-k{ipc}"
        self._pace = pace

    def has(self, info: ClassInfo, images: ClassImages) -> bool:
        """Is there a file of this class's modes? Nothing is read."""
        shared = [self._shared_path(self._key(info, images))] if self._shared else []
        return any(path.is_file() for path in (self._path(info), *shared))

    def stage(self, missing: Sequence[tuple[ClassInfo, ClassImages]]) -> Stage:
        """Clustering these classes."""
        each = self._pace.seconds
        return Stage(
            what=f"finds {self._ipc} modes in each of {len(missing):,} classes",
            seconds=None if each is None else each * len(missing),
            there=not missing,
        )

    def fill(
        self, classes: Sequence[tuple[ClassInfo, ClassImages]], workers: int, times: StageTimes
    ) -> None:
        """Find the modes that are missing.

        Up to `workers` classes are clustered at once while the next one is encoded; no more than
        their latents are held.
        """
        missing = [pair for pair in classes if self._kept(*pair) is None]
        if not missing:
            return
        running: deque[Future[Modes]] = deque()
        stage = self.stage(missing)
        announce(stage)
        with (
            self._latents.encoding(missing),
            progress("finding modes", len(missing), "classes", stage=stage) as advance,
            ThreadPoolExecutor(workers) as pool,
            times.gathering(),
        ):
            for info, images in missing:
                with times.stage("encode"):
                    real = self._latents.latents(info, images)
                running.append(pool.submit(self._find, info, images, real))
                while running and (len(running) >= workers or running[0].done()):
                    with times.stage("modes"):
                        running.popleft().result()
                    advance()
            with times.stage("modes"):
                while running:
                    running.popleft().result()
                    advance()

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
            shared = found(self._shared_path(key), key, format_)
            if shared is not None:
                return format_.write(self._path(info), shared, key)
        return own

    def _find(self, info: ClassInfo, images: ClassImages, latents: Tensor) -> Modes:
        key, format_ = self._key(info, images), ModeFile(images)

        def make() -> Modes:
            start = time.monotonic()
            modes = cluster(self._finder, latents, self._ipc)
            self._pace.add(1, time.monotonic() - start)
            return modes

        if self._shared is None:
            modes = make()
        else:
            modes = cached(self._shared_path(key), key, make, format_)
        return format_.write(self._path(info), modes, key)  # the set is this run's alone

    def _shared_path(self, key: Mapping[str, str]) -> Path:
        assert self._shared is not None
        return self._shared / f"{key['latents']}.safetensors"

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

    None for one that cannot be told from others: a bare function, one with arguments bound, a
    class typed in by hand.
    """
    kind = type(finder)
    if isinstance(finder, partial):
        return None
    module = inspect.getmodule(kind)
    try:
        code = inspect.getsource(module) if module else None
    except (OSError, TypeError):
        code = None
    if code is None or not hasattr(finder, "__dict__"):
        return None
    own = {name: value for name, value in vars(finder).items() if not is_cached(finder, name)}
    try:
        settings = json.dumps(own, sort_keys=True, default=_told)
    except (TypeError, ValueError, RecursionError):
        return None
    text = "\n".join([kind.__qualname__, settings, code])
    return hashlib.blake2s(text.encode(), digest_size=6).hexdigest()


def is_cached(part: object, name: str) -> bool:
    """Is the attribute what a cached property has found?"""
    return isinstance(inspect.getattr_static(type(part), name, None), cached_property)


def _told(value: object) -> Any:
    """An array by what it holds, a dataclass by its fields; `TypeError` for anything else."""
    if isinstance(value, Tensor | np.ndarray):
        return tensors_digest({"": torch.as_tensor(value)})
    if is_dataclass(value):
        return [type(value).__qualname__, vars(value)]
    raise TypeError(f"{value!r} cannot be told from another")

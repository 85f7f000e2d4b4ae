"""A look at every real image before any work: does it decode, and what is its content?"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset, RealImage
from mgd3.data.decoding import why_not
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import progress
from mgd3.runtime.stages import Stage, announce
from mgd3.storage.documents import remembered
from mgd3.storage.files import remember
from mgd3.storage.timing import WorkPace

log = logging.getLogger(__name__)

_BROKEN = "broken: "  # then why
_LOOKERS = 16  # threads that ask for files' sizes and times
_Entries = dict[str, tuple[tuple[int, int], str]]  # by key: size and time, digest


@dataclass(frozen=True)
class ClassImages:
    """The usable images of one class and a digest of each one's content."""

    images: tuple[RealImage, ...]
    digests: tuple[str, ...]


def take_inventory(
    dataset: RealDataset, split: str, minimum: int, cache: Path, workers: int, each: int = 1
) -> list[ClassImages]:
    """Decode and hash every image of a split once; results are remembered by size and time.

    `each` is how many real images a distilled one takes, for messages. Returns one entry per
    class, in label order. Raises `UserError` if a file does not decode
    (unless `dataset.skip_broken`) or a class has fewer than `minimum` usable images.
    """
    listing = [dataset.images(split, label) for label in range(len(dataset.classes))]
    memories = [_Memory(dataset, split, info, cache) for info in dataset.classes]
    known = _known(memories, listing)
    stage, pace = _stage(dataset, split, listing, known, cache), _pace(cache)
    announce(stage)
    found: dict[str, str] = {}
    total, there = sum(map(len, listing)), sum(map(len, known))
    with (
        progress(f"checking the real {split} images", total, "images", there, stage, pace) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for images, memory, digests in zip(listing, memories, known, strict=True):
            found |= digests | memory.examine(images, digests, pool, bar)
    broken = [key for key, digest in found.items() if digest.startswith(_BROKEN)]
    if broken:
        named = "; ".join(f"{key} ({found[key].removeprefix(_BROKEN)})" for key in broken[:5])
        message = (
            f"{len(broken)} of {len(found)} {split} images of dataset={dataset.name} cannot be "
            f"decoded: {named}{' …' if len(broken) > 5 else ''}"
        )
        if not dataset.skip_broken:
            raise UserError(
                f"{message}. Replace or remove them, or set dataset.skip_broken=true to leave "
                "them out"
            )
        log.warning("%s; left out (dataset.skip_broken=true)", message)
    kept = [[i for i in images if not found[i.key].startswith(_BROKEN)] for images in listing]
    _require(dataset, split, [len(images) for images in kept], minimum, each)
    return [ClassImages(tuple(images), tuple(found[i.key] for i in images)) for images in kept]


def require_images(dataset: RealDataset, minimum: int, each: int = 1) -> None:
    """`UserError` if a class has fewer than `minimum` training files, whether usable or not."""
    counts = [len(dataset.images("train", label)) for label in range(len(dataset.classes))]
    _require(dataset, "train", counts, minimum, each)


def _require(
    dataset: RealDataset, split: str, counts: Sequence[int], minimum: int, each: int
) -> None:
    """`UserError` that names the smallest class if it has fewer than `minimum` images."""
    least = min(counts)
    if least >= minimum:
        return
    smallest = dataset.classes[counts.index(least)]
    most = least // each
    lower = f"ipc={most} is the largest possible here; lower ipc, or " if most else ""
    raise UserError(
        f"class {smallest.wnid} ({smallest.name}), the smallest of dataset={dataset.name}, has "
        f"{least} usable {split} images, fewer than the {minimum} needed; {lower}add images"
    )


def looking(dataset: RealDataset, split: str, cache: Path) -> tuple[Stage, list[ClassImages]]:
    """What `take_inventory` would look at, and the images; without digests where a file is new.

    Reads no file.
    """
    listing = [dataset.images(split, label) for label in range(len(dataset.classes))]
    if dataset.location is None:  # in memory
        known = [{i.key: _digest(i) for i in images} for images in listing]
    else:
        known = _known([_Memory(dataset, split, c, cache) for c in dataset.classes], listing)
    return _stage(dataset, split, listing, known, cache), [
        ClassImages(tuple(images), tuple(digests[i.key] for i in images if i.key in digests))
        for images, digests in zip(listing, known, strict=True)
    ]


def _known(
    memories: Sequence[_Memory], listing: Sequence[Sequence[RealImage]]
) -> list[dict[str, str]]:
    """What is remembered of each class; on network storage every file's time is a wait."""
    with (
        progress("looking for changed images", len(memories), "classes") as advance,
        ThreadPoolExecutor(_LOOKERS) as pool,
    ):
        found = []
        for digests in pool.map(_Memory.of, memories, listing):
            found.append(digests)
            advance()
    return found


def _stage(
    dataset: RealDataset,
    split: str,
    listing: Sequence[Sequence[RealImage]],
    known: Sequence[Mapping[str, str]],
    cache: Path,
) -> Stage:
    new = sum(map(len, listing)) - sum(map(len, known))
    each = _pace(cache).seconds
    return Stage(
        what=f"looks at the real {split} images of {dataset.name}"
        + (f", {new:,} of them new" if new else ""),
        seconds=None if each is None else new * each,
        there=new == 0,
    )


def _pace(cache: Path) -> WorkPace:
    return WorkPace(cache, "looking at a real image", torch.device("cpu"))


@dataclass(frozen=True)
class SplitContent:
    """What the usable images of a split are: by name and bytes, wherever they lie."""

    digest: str
    images: int
    classes: dict[str, list[Any]]  # wnid: [number of images, digest]


def contents_of(
    dataset: RealDataset, splits: Iterable[str], cache: Path, workers: int
) -> dict[str, SplitContent]:
    """What the real images of some splits are; `UserError` for one that does not decode."""
    inventories = {s: take_inventory(dataset, s, 1, cache, workers) for s in splits}
    for line in (*_left_out(dataset), *_copies(dataset, inventories)):
        log.warning("dataset=%s: %s", dataset.name, line)
    return {s: content_of(dataset, found, cache) for s, found in inventories.items()}


def _left_out(dataset: RealDataset) -> list[str]:
    """What a dataset of files says of files that it does not take."""
    remarks = getattr(dataset, "remarks", None)
    return [] if remarks is None else remarks()


def _copies(dataset: RealDataset, inventories: Mapping[str, Sequence[ClassImages]]) -> list[str]:
    """Photographs that stand in two splits, or in two classes."""
    first: dict[str, tuple[str, int]] = {}
    places: dict[str, set[tuple[str, int]]] = defaultdict(set)  # of those in several
    for split, inventory in inventories.items():
        for label, images in enumerate(inventory):
            place = split, label
            for digest in images.digests:
                if (before := first.setdefault(digest, place)) is not place:
                    places[digest] |= {before, place}
    leaked = sum(len({split for split, _ in at}) > 1 for at in places.values())
    shared = sum(len({label for _, label in at}) > 1 for at in places.values())
    found = []
    if leaked:
        found.append(f"{leaked} photographs stand among the training and the test images")
    if shared:
        found.append(f"{shared} photographs stand in two classes")
    return found


def content_of(dataset: RealDataset, inventory: Sequence[ClassImages], cache: Path) -> SplitContent:
    """Digests of a split; the lists behind them are kept in `cache`, to tell later what changed."""
    classes: dict[str, list[Any]] = {}
    for info, found in zip(dataset.classes, inventory, strict=True):
        names = [image.key for image in found.images]
        listing = dict(zip(names, found.digests, strict=True))
        digest = _digest_of(json.dumps(listing))
        classes[info.wnid] = [len(listing), digest]
        if dataset.location is not None and not (kept := _listing(cache, digest)).is_file():
            remember(kept, listing)
    return SplitContent(
        digest=_digest_of(json.dumps(classes)),
        images=sum(count for count, _ in classes.values()),
        classes=classes,
    )


def changed_images(before: Mapping[str, Any], now: SplitContent, cache: Path) -> tuple[int, bool]:
    """How many images differ from `before` (a SplitContent's `classes`), and whether that is exact.

    Without the lists that earlier runs kept, whole classes are counted.
    """
    changed, exact = 0, True
    for wnid, (count, digest) in now.classes.items():
        old_count, old_digest = before.get(wnid, (0, ""))
        if digest == old_digest:
            continue
        lists = (remembered(_listing(cache, d), dict[str, str]) for d in (old_digest, digest))
        old, new = lists
        if not (old and new):
            changed, exact = changed + max(count, old_count), False
            continue
        changed += sum(old.get(key) != new.get(key) for key in old.keys() | new.keys())
    return changed, exact


def _listing(cache: Path, digest: str) -> Path:
    return cache / "inventory" / "content" / f"{digest or 'none'}.json"


def _digest_of(text: str) -> str:
    return hashlib.blake2s(text.encode(), digest_size=8).hexdigest()


class _Memory:
    """Digests of a class's files as earlier runs found them, by the files' size and time."""

    def __init__(self, dataset: RealDataset, split: str, info: ClassInfo, cache: Path) -> None:
        self._path: Path | None = None  # of images that are in memory anyway
        if dataset.location is not None:
            place = hashlib.blake2s(str(dataset.location).encode(), digest_size=6).hexdigest()
            self._path = cache / "inventory" / place / split / f"{info.wnid}.json"
        self._stamps: dict[str, tuple[int, int] | None] = {}

    def of(self, images: Sequence[RealImage]) -> dict[str, str]:
        """Digests by key of those images whose files are as they were."""
        if self._path is None:
            return {}
        self._stamps = {i.key: _stamp(i) for i in images}
        known = remembered(self._path, _Entries)
        return {k: d for k, (stamp, d) in known.items() if self._stamps.get(k) == stamp}

    def examine(
        self,
        images: Sequence[RealImage],
        known: dict[str, str],
        pool: ThreadPoolExecutor,
        advance: Callable[[], None],
    ) -> dict[str, str]:
        """Content digest (or `_BROKEN`) by key of the others, which are read now."""
        fresh = [i for i in images if i.key not in known]
        found: dict[str, str] = {}
        for image, digest in zip(fresh, pool.map(_digest, fresh), strict=True):
            found[image.key] = digest
            advance()
        if fresh and self._path is not None:
            whole = {k: d for k, d in (known | found).items() if not d.startswith(_BROKEN)}
            remember(self._path, {k: [self._stamps[k], d] for k, d in whole.items()})
        return found


def _stamp(image: RealImage) -> tuple[int, int] | None:
    try:
        return image.stamp()
    except OSError:  # a dangling link, say: `_digest` finds it broken
        return None


def _digest(image: RealImage) -> str:
    try:
        content = image.content()
        image.decode()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise anything for a damaged file
        return f"{_BROKEN}{why_not(error)}"
    return hashlib.blake2s(content, digest_size=16).hexdigest()

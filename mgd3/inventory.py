"""A look at every real image before any work: does it decode, and what is its content?"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mgd3.artifacts import CorruptFileError, read_json, write_json
from mgd3.datasets import ArrayImage, RealDataset, RealImage
from mgd3.progress import track
from mgd3.types import UserError

log = logging.getLogger(__name__)

_BROKEN = "broken"


@dataclass(frozen=True)
class ClassImages:
    """The usable images of one class and a digest of each one's content."""

    images: tuple[RealImage, ...]
    digests: tuple[str, ...]


def take_inventory(
    dataset: RealDataset, split: str, minimum: int, cache: Path, workers: int
) -> list[ClassImages]:
    """Decode and hash every image of a split once; results are remembered by size and time.

    Returns one entry per class, in label order. Raises `UserError` if a file does not decode
    (unless `dataset.skip_broken`) or a class has fewer than `minimum` usable images.
    """
    listing = [dataset.images(split, label) for label in range(len(dataset.classes))]
    found = _examine(dataset.name, split, [i for images in listing for i in images], cache, workers)
    broken = [key for key, digest in found.items() if digest == _BROKEN]
    if broken:
        message = (
            f"{len(broken)} of {len(found)} {split} images of dataset={dataset.name} cannot be "
            f"decoded: {', '.join(broken[:5])}{' …' if len(broken) > 5 else ''}"
        )
        if not dataset.skip_broken:
            raise UserError(
                f"{message}. Replace or remove them, or set dataset.skip_broken=true to leave "
                "them out"
            )
        log.warning("%s; left out (dataset.skip_broken=true)", message)
    usable = []
    for info, images in zip(dataset.classes, listing, strict=True):
        kept = tuple(i for i in images if found[i.key] != _BROKEN)
        if len(kept) < minimum:
            raise UserError(
                f"class {info.wnid} ({info.name}) of dataset={dataset.name} has {len(kept)} usable "
                f"{split} images, fewer than the {minimum} needed; lower ipc or add images"
            )
        usable.append(ClassImages(kept, tuple(found[i.key] for i in kept)))
    return usable


def _examine(
    name: str, split: str, images: Sequence[RealImage], cache: Path, workers: int
) -> dict[str, str]:
    """Content digest (or `_BROKEN`) by key; only new or changed files are read."""
    if all(isinstance(i, ArrayImage) for i in images):
        return {i.key: _digest(i) for i in images}
    memory = cache / "inventory" / f"{name}-{split}-{_location(images[0])}.json"
    known: dict[str, list] = {}
    if memory.is_file():
        try:
            known = read_json(memory)
        except CorruptFileError as error:
            log.warning("%s; looking at every image again", error)
    stamps = {i.key: list(i.stamp()) for i in images}
    fresh = [i for i in images if known.get(i.key, [None])[0] != stamps[i.key]]
    if fresh:
        with ThreadPoolExecutor(workers) as pool:
            digests = track(pool.map(_digest, fresh), f"checking {name} {split} images", len(fresh))
            for image, digest in zip(fresh, digests, strict=True):
                known[image.key] = [stamps[image.key], digest]
        write_json(memory, known)
    return {i.key: known[i.key][1] for i in images}


def _digest(image: RealImage) -> str:
    try:
        content = image.content()
        image.decode()
    except Exception:  # Pillow's plugins raise anything for a damaged file
        return _BROKEN
    return hashlib.blake2s(content, digest_size=16).hexdigest()


def _location(image: RealImage) -> str:
    """Tells apart datasets of one name in two places."""
    root = str(image.path.resolve().parents[2]) if hasattr(image, "path") else image.key
    return hashlib.blake2s(root.encode(), digest_size=4).hexdigest()

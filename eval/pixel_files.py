"""Decoded pixels in files: one process of a machine decodes an image set, the others map it.

A file is named by the content of its images, so that other images get another file. Sets that
decode within about a second get none, and the folder stays below a limit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import warnings
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from mgd3.runtime.batching import free_bytes
from mgd3.runtime.errors import CorruptFileError
from mgd3.runtime.progress import track
from mgd3.storage.cache import cached
from mgd3.storage.files import whole_file

log = logging.getLogger(__name__)

LEAST = 32 * 2**20  # bytes that are worth a file: 200 images of 224 px, a second of decoding
MOST = 32 * 2**30  # bytes that all files of a cache take together
_SHARE = 0.25  # of the device's free memory that pixels may take
_CHECKSUM = 4  # bytes at a file's end
_VERSION = 1  # of what becomes of an image before its pixels are here


def held_or_mapped(
    images: Iterable[Tensor],
    shape: tuple[int, ...],
    made_from: Sequence[str],
    device: torch.device,
    cache: Path,
    what: str,
    limit: int | None = None,
) -> Tensor:
    """All `images` (3, H, W) uint8 as one tensor of `shape` on `device`; `what` they are.

    `made_from` identifies the images and how they become pixels of that shape: `images` is only
    read where the cache has no file of it. More than `limit` bytes (None: a quarter of what is
    free) stay on the CPU, in the file, which is mapped: the operating system keeps as much of it
    in memory as there is room.
    """
    size = torch.Size(shape).numel()
    held = size <= (int(_SHARE * free_bytes(device)) if limit is None else limit)
    counted = track(images, f"reading the {what} images", shape[0], "images")
    key = f"{_VERSION} {PIL.__version__} {shape} {list(made_from)}"
    name = hashlib.blake2s(key.encode(), digest_size=8).hexdigest()
    path = cache / "pixels" / f"{name}.uint8"
    if held and not path.is_file() and (size < LEAST or not _room(path.parent, size)):
        return torch.stack(list(counted)).to(device)
    pixels = cached(path, {}, lambda: counted, PixelFile(shape, checked=held))
    return pixels.to(device) if held else pixels


def _room(folder: Path, size: int) -> bool:
    """May a file of so many bytes join the others?"""
    taken = sum(file.stat().st_size for file in folder.glob("*.uint8"))
    place = next(p for p in (folder, *folder.parents) if p.is_dir())
    room = taken + size <= MOST and 2 * size <= shutil.disk_usage(place).free
    if not room:
        log.info("decoded pixels are not kept in %s, which has no room: delete old ones", folder)
    return room and os.access(place, os.W_OK)


@dataclass(frozen=True)
class PixelFile:
    """Pixels of one shape and their checksum: a file that is mapped, not read."""

    shape: tuple[int, ...]
    checked: bool  # read once to compare the checksum; False where it does not fit into memory

    def read(self, path: Path, key: Mapping[str, str]) -> Tensor:
        """The file as a tensor, uint8; what it was made from is in its name."""
        count = torch.Size(self.shape).numel()
        if path.stat().st_size != count + _CHECKSUM:
            raise CorruptFileError(f"{path} is not {count + _CHECKSUM} bytes long")
        # a file that can only be read will do; what fits into memory is private
        mapped: Any = np.memmap(path, np.uint8, mode="c" if self.checked else "r")
        if self.checked and _bytes(zlib.crc32(mapped[:count])) != mapped[count:].tobytes():
            raise CorruptFileError(f"{path} does not match its checksum")
        with warnings.catch_warnings():  # a tensor of it could be written to; nothing ever is
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(mapped[:count]).view(self.shape)

    def write(self, path: Path, value: Iterable[Tensor], key: Mapping[str, str]) -> Tensor:
        """Image by image, so that they never are in memory together."""
        log.info("decoded pixels are kept in %s", path)
        checksum = 0
        with whole_file(path) as file:
            for image in value:
                content = image.numpy().tobytes()
                checksum = zlib.crc32(content, checksum)
                file.write(content)
            file.write(_bytes(checksum))
        return self.read(path, key)


def _bytes(checksum: int) -> bytes:
    return checksum.to_bytes(_CHECKSUM, "little")

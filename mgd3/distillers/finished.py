"""Latents of images that are finished: what set-level guidance and refinement read.

Each is a small file beside the images until the set is whole: a PNG, encoded again, would not give
it back. It is written before its image, so that an image without one is made again.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mgd3.runtime.errors import CorruptFileError
from mgd3.storage.tensors import load_tensors, save_tensors

log = logging.getLogger(__name__)

FOLDER = ".latents"  # hidden, or readers of the set's folder take it for images
ImageKey = tuple[str, int]  # wnid and noise stream


class FinishedLatents:
    """By image; what one image may read depends on its own place in the class alone.

    Image k of a class reads those before k - k % block, of its own candidates' round: with `block`
    1 all before it, as the papers do, one after another; with 10, ten images of a class can be made
    at once. Neither batch size nor number of processes has a part in it.
    """

    def __init__(self, folder: Path | None, ipc: int, block: int = 1) -> None:
        """`folder` is the set's, None for memory alone."""
        self._folder = None if folder is None else folder / FOLDER
        self._ipc, self._block = ipc, block
        self._held: dict[ImageKey, Tensor] = {}

    def add(self, keys: Sequence[ImageKey], latents: Tensor) -> None:
        """Keep latents (B, C, h, w), on disk where there is a folder."""
        for key, row in zip(keys, latents.cpu(), strict=True):
            self._held[key] = row.clone()
            if self._folder is not None:
                save_tensors(self._path(key), {"latents": row}, {})

    def has(self, key: ImageKey) -> bool:
        """Is this image's there, and whole?"""
        if key in self._held:
            return True
        if self._folder is None or not self._path(key).is_file():
            return False
        try:
            self._held[key] = load_tensors(self._path(key))["latents"]
        except (CorruptFileError, KeyError) as error:
            log.warning("%s; that image is made again", error)
            return False
        return True

    def of(self, keys: Iterable[ImageKey]) -> Tensor:
        """Latents (B, C, h, w) of images that are there."""
        return torch.stack([self._held[key] for key in keys if self.has(key)])

    def read_by(self, key: ImageKey) -> list[ImageKey]:
        """The images that one may read, in their order."""
        wnid, k = key
        first = k // self._ipc * self._ipc  # of its candidates' round
        return [(wnid, j) for j in range(first, k - (k - first) % self._block)]

    def waves(self, wanted: Sequence[ImageKey]) -> list[list[ImageKey]]:
        """The images in an order in which each comes after those that it reads; inside, any."""
        found: dict[int, list[ImageKey]] = {}
        for key in wanted:
            first = key[1] // self._ipc * self._ipc
            found.setdefault(first + (key[1] - first) // self._block * self._block, []).append(key)
        return [found[start] for start in sorted(found)]

    def forget(self) -> None:
        """Remove the files: the set is whole."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _path(self, key: ImageKey) -> Path:
        assert self._folder is not None
        return self._folder / key[0] / f"{key[1]:05d}.safetensors"

"""Real latents of one class at a time, encoded once and remembered by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from mgd3.backbones.contract import Codec
from mgd3.data.class_lists import ClassInfo
from mgd3.data.decode_queue import DecodeQueue
from mgd3.data.inventory import ClassImages
from mgd3.modes.encoder import Encode, Encoder, device_of
from mgd3.runtime.progress import progress
from mgd3.runtime.stages import Stage, announce
from mgd3.storage.cache import cached
from mgd3.storage.timing import WorkPace

_MOMENTS = "-moments"  # ends the name of a file that holds the posterior's
Pair: TypeAlias = tuple[ClassInfo, ClassImages]


class LatentCache:
    """Encodes class by class; never more than one class's latents and a few batches of pixels held.

    `flip`: «none», «all», or «random» as in the released loader (p = 0.5, each image's stream).
    Files lie in `folder`/<codec>/<wnid>-<digest>.safetensors; the digest covers the images'
    contents and order, so a changed image or option gets another file.
    """

    def __init__(self, folder: Path, codec: Codec, flip: str, workers: int = 1) -> None:
        """`workers` threads decode."""
        self.folder = folder
        self.codec = codec
        self.flip = flip
        self._workers = workers
        self._encoder = Encoder(codec, flip)
        self._advance: Callable[..., None] | None = None  # of the bar of all classes
        self._queue: DecodeQueue | None = None  # of all classes

    def stage(self, classes: Sequence[Pair], moments: bool = False) -> Stage:
        """Encoding what the cache lacks of some classes."""
        new = _count(self._missing(classes, moments))
        each = self._pace.seconds
        return Stage(
            what=f"encodes {new:,} {self._images} as latents",
            seconds=None if each is None else new * each,
            there=new == 0,
        )

    @contextmanager
    def encoding(self, classes: Sequence[Pair], moments: bool = False) -> Iterator[None]:
        """One bar for all classes that are encoded inside, announced where it takes long."""
        missing, stage = self._missing(classes, moments), self.stage(classes, moments)
        if not missing:
            yield
            return
        announce(stage)
        with (
            progress(
                "encoding", _count(missing), self._images, stage=stage, pace=self._pace
            ) as bar,
            self._decoding(missing) as queue,
        ):
            self._advance, self._queue = bar, queue
            try:
                yield
            finally:
                self._advance = self._queue = None

    @property
    def _images(self) -> str:
        """What is encoded, in words."""
        return "mirrored real images" if self.flip == "all" else "real images"

    @property
    def _pace(self) -> WorkPace:
        kind = f"encoding by {self.codec.id}"
        return WorkPace(self.folder.parent, kind, device_of(self.codec))

    @cached_property
    def _spread(self) -> bool:
        """Is an image's latent a distribution? If not (TAESD), `latents` has all there is of it."""
        size = self.codec.image_size
        return bool(self.codec.moments(torch.zeros(1, 3, size, size))[1].any())

    def _missing(self, classes: Sequence[Pair], moments: bool) -> list[Pair]:
        """Those classes that the cache has no latents of."""
        end = _MOMENTS if moments and self._spread else ""
        return [pair for pair in classes if not self._path(f"{self.key(*pair)}{end}").is_file()]

    def _decoding(self, classes: Sequence[Pair]) -> DecodeQueue:
        by_wnid = {info.wnid: images.images for info, images in classes}
        return self._encoder.queue(self._workers, by_wnid)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def latents(self, info: ClassInfo, images: ClassImages) -> Tensor:
        """All latents of a class, (N, C, h, w) float32, in the images' order."""
        key, encode = self.key(info, images), self.codec.encode
        (latents,) = self._cached(
            key, info, images, lambda pixels, keys: (encode(pixels, keys),), ["latents"]
        )
        return latents

    def moments(self, info: ClassInfo, images: ClassImages) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of a class's latents, (N, C, h, w) each."""
        if not self._spread:
            mean = self.latents(info, images)
            return mean, torch.zeros_like(mean)
        key, moments = f"{self.key(info, images)}{_MOMENTS}", self.codec.moments
        mean, std = self._cached(
            key, info, images, lambda pixels, _: moments(pixels), ["mean", "std"]
        )
        return mean, std

    def key(self, info: ClassInfo, images: ClassImages) -> str:
        """Identifies these latents: codec, images in their order, flip."""
        content = [self.flip, *images.digests]
        if self.flip == "random" or self.codec.samples_latents:  # drawn from the images' names
            content += [image.key for image in images.images]
        digest = hashlib.blake2s("\n".join(content).encode(), digest_size=10).hexdigest()
        return f"{self.codec.id}/{info.wnid}-{digest}"

    def _cached(
        self, key: str, info: ClassInfo, images: ClassImages, encode: Encode, names: list[str]
    ) -> list[Tensor]:
        """What `encode` gives of all images of a class, by name, from the cache if it is there."""

        def make() -> dict[str, Tensor]:
            parts = list(self._encoded(info, images, encode))
            return {name: torch.cat([p[k] for p in parts]) for k, name in enumerate(names)}

        found: dict[str, Tensor] = cached(self._path(key), {"wnid": info.wnid}, make)
        if self._queue is not None:  # another process may have encoded this class
            self._queue.leave(info.wnid, images.images)
        return [found[name] for name in names]

    def _encoded(
        self, info: ClassInfo, images: ClassImages, encode: Encode
    ) -> Iterator[tuple[Tensor, ...]]:
        """Batch by batch: under the bar of all classes, or this one's own."""
        if self._queue is not None and self._advance is not None:
            yield from self._encoder.encode(images.images, self._queue, encode, self._advance)
            return
        what, count = f"encoding {info.wnid} {info.name}", len(images.images)
        with (
            progress(what, count, "real images", pace=self._pace) as advance,
            self._decoding([(info, images)]) as queue,
        ):
            yield from self._encoder.encode(images.images, queue, encode, advance)


def _count(classes: Sequence[Pair]) -> int:
    return sum(len(images.images) for _, images in classes)

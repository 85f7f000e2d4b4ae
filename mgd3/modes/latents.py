"""Real latents of one class at a time, encoded once and remembered by content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from mgd3.backbones.contract import Codec
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealImage
from mgd3.data.inventory import ClassImages
from mgd3.data.pixels import center_crop, from_pil, to_unit
from mgd3.runtime.batching import Batches
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import progress
from mgd3.runtime.seeding import stream
from mgd3.runtime.stages import Stage, announce
from mgd3.storage.cache import cached
from mgd3.storage.timing import WorkPace

# Fixed, because a network rounds differently in another batch and k-means may then differ too.
_CHUNK = 16
_MOMENTS = "-moments"  # ends the name of a file that holds the posterior's
Pair: TypeAlias = tuple[ClassInfo, ClassImages]
_Encode: TypeAlias = Callable[[Sequence[RealImage]], tuple[Tensor, ...]]


class LatentCache:
    """Encodes class by class; never more than one class's latents and one batch of pixels held.

    `flip`: «none», «all», or «random» as in the released loader (p = 0.5, each image's stream).
    Files lie in `folder`/<codec>/<wnid>-<digest>.safetensors; the digest covers the images'
    contents and order, so a changed image or option gets another file.
    """

    def __init__(self, folder: Path, codec: Codec, flip: str) -> None:
        self.folder = folder
        self.codec = codec
        self.flip = flip
        self._batches = Batches(_CHUNK, "encoding")
        self._advance: Callable[..., None] | None = None  # of the bar of all classes

    def stage(self, classes: Sequence[Pair], moments: bool = False) -> Stage:
        """Encoding what the cache lacks of some classes."""
        new = self._missing(classes, moments)
        each = self._pace.seconds
        return Stage(
            what=f"encodes {new:,} {self._images} as latents",
            seconds=None if each is None else new * each,
            there=new == 0,
        )

    @contextmanager
    def encoding(self, classes: Sequence[Pair], moments: bool = False) -> Iterator[None]:
        """One bar for all classes that are encoded inside, announced where it takes long."""
        stage, new = self.stage(classes, moments), self._missing(classes, moments)
        if not new:
            yield
            return
        announce(stage)
        with progress("encoding", new, self._images, stage=stage, pace=self._pace) as advance:
            self._advance = advance
            try:
                yield
            finally:
                self._advance = None

    @property
    def _images(self) -> str:
        """What is encoded, in words."""
        return "mirrored real images" if self.flip == "all" else "real images"

    @property
    def _pace(self) -> WorkPace:
        compute = getattr(self.codec, "compute", None)
        device = compute.torch_device if compute else torch.device("cpu")
        return WorkPace(self.folder.parent, f"encoding by {self.codec.id}", device)

    def _missing(self, classes: Sequence[Pair], moments: bool) -> int:
        """Images of those classes that the cache has no latents of."""
        return sum(
            len(images.images)
            for info, images in classes
            if not self._path(f"{self.key(info, images)}{_MOMENTS if moments else ''}").is_file()
        )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def latents(self, info: ClassInfo, images: ClassImages) -> Tensor:
        """All latents of a class, (N, C, h, w) float32, in the images' order."""
        (latents,) = self._cached(self.key(info, images), info, images, self._of, ["latents"])
        return latents

    def moments(self, info: ClassInfo, images: ClassImages) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of a class's latents, (N, C, h, w) each."""
        key = f"{self.key(info, images)}{_MOMENTS}"
        mean, std = self._cached(key, info, images, self._moments_of, ["mean", "std"])
        return mean, std

    def key(self, info: ClassInfo, images: ClassImages) -> str:
        """Identifies these latents: codec, images in their order, flip."""
        content = [self.flip, *images.digests]
        if self.flip == "random" or self.codec.samples_latents:  # drawn from the images' names
            content += [image.key for image in images.images]
        digest = hashlib.blake2s("\n".join(content).encode(), digest_size=10).hexdigest()
        return f"{self.codec.id}/{info.wnid}-{digest}"

    def _cached(
        self, key: str, info: ClassInfo, images: ClassImages, encode: _Encode, names: list[str]
    ) -> list[Tensor]:
        """What `encode` gives of all images of a class, by name, from the cache if it is there."""

        def make() -> dict[str, Tensor]:
            parts = list(self._encode(info, images, encode))
            return {name: torch.cat([p[k] for p in parts]) for k, name in enumerate(names)}

        found: dict[str, Tensor] = cached(self._path(key), {"wnid": info.wnid}, make)
        return [found[name] for name in names]

    def _encode(
        self, info: ClassInfo, images: ClassImages, encode: _Encode
    ) -> Iterator[tuple[Tensor, ...]]:
        with self._bar(info, images) as advance:
            for start in range(0, len(images.images), _CHUNK):
                batch = images.images[start : start + _CHUNK]
                for attempt in self._batches.attempts(batch):
                    with attempt as part:
                        latents = self._finite(part, encode(part))
                        advance(len(part))
                    if attempt.error is None:
                        yield latents

    def _bar(
        self, info: ClassInfo, images: ClassImages
    ) -> AbstractContextManager[Callable[..., None]]:
        """The bar of all classes, or this one's own."""
        if self._advance is not None:
            return nullcontext(self._advance)
        what = f"encoding {info.wnid} {info.name}"
        return progress(what, len(images.images), "real images", pace=self._pace)

    def _of(self, images: Sequence[RealImage]) -> tuple[Tensor]:
        return (self.codec.encode(self._pixels_of(images), [image.key for image in images]),)

    def _moments_of(self, images: Sequence[RealImage]) -> tuple[Tensor, Tensor]:
        return self.codec.moments(self._pixels_of(images))

    def _finite(
        self, images: Sequence[RealImage], latents: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """The latents (B, C, h, w) on the host; `UserError` naming one that is not finite."""
        found = tuple(part.cpu() for part in latents)
        for part in found:
            bad = ~part.flatten(1).isfinite().all(dim=1)  # (B,)
            if bad.any():
                key = images[int(bad.nonzero()[0])].key
                raise UserError(f"the latent of {key} is not finite; its file or the VAE is bad")
        return found

    def _pixels_of(self, images: Sequence[RealImage]) -> Tensor:
        """(B, 3, H, W) in [-1, 1]."""
        return to_unit(torch.stack([self._pixels(image) for image in images]))

    def _pixels(self, image: RealImage) -> Tensor:
        pixels = from_pil(center_crop(image.decode(), self.codec.image_size))
        if self.flip == "none":
            return pixels
        mirrored = self.flip == "all" or torch.rand((), generator=stream("flip", image.key)) < 0.5
        return pixels.flip(-1) if mirrored else pixels

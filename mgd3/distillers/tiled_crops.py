"""RDED (Sun et al. 2024): images tiled from crops of real images that an observer knows best."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from mgd3.data.datasets import RealDataset, RealImage
from mgd3.data.distilled import DistilledDataset, DistilledWriter
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.data.pixels import from_pil, to_pil
from mgd3.runtime import checks
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import progress
from mgd3.runtime.seeding import stream
from mgd3.runtime.stages import Stage, announce
from mgd3.storage.timing import StageTimes, WorkPace

_TOGETHER = 32  # images whose crops are scored at a time
_ATTEMPTS = 10  # torchvision's RandomResizedCrop gives up after as many
_ROUNDING = ("nearest", "truncate")


class Observer(Protocol):
    """A network that knows the classes."""

    image_size: int

    def observe(self, crops: Tensor) -> Tensor:
        """Logits (B, classes) of crops (B, 3, h, w) in [0, 1], on the CPU.

        Crops smaller than `image_size` lie in the middle of its mean colour.
        """


class ObserverSpace(Protocol):
    """Where the observer of some classes comes from."""

    device: torch.device
    image_size: int

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> Observer:
        """The observer of these classes, trained now unless the cache has it."""

    def stages(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> list[Stage]:
        """What has to be done first."""


@dataclass(frozen=True)
class Crops:
    """One crop of each of some real images, and the observer's cross-entropy to their class."""

    pixels: Tensor  # (N, 3, h, w) in [0, 1]
    losses: Tensor  # (N,) float64

    def best(self, count: int) -> Crops:
        """The `count` of least loss, ascending; ties in their order."""
        rows = self.losses.argsort(stable=True)[:count]
        return Crops(self.pixels[rows], self.losses[rows])


class TiledCrops:
    """Of `mipc` real images of a class, `num_crop` crops each, an observer keeps one of each image.

    Fewer where a class has fewer, more where more crops are needed. The ipc factor^2 of least
    cross-entropy fill the class's images, factor x factor crops in each:
    place q of image i, row by row, is rank q ipc + i. An image draws from a stream of its own, so
    neither workers nor resumption change a byte.
    """

    def __init__(
        self,
        features: ObserverSpace | None,
        work: Work,
        mipc: int,
        num_crop: int,
        factor: int,
        crop_scale: Sequence[float],
        rounding: str,
        jpeg_quality: int | None,
    ) -> None:
        """`rounding` is how a pixel becomes one of 256 values; `jpeg_quality` None loses nothing.

        Raises `UserError` for a feature space that knows no classes.
        """
        if features is None or not getattr(features, "knows_classes", True):
            raise UserError(
                "method: crops are chosen by an observer that knows the classes; add "
                "features=observer"
            )
        self.features = features
        self.work = work
        self.mipc = checks.integer("method.mipc", mipc, minimum=1)
        self.num_crop = checks.integer("method.num_crop", num_crop, minimum=1)
        self.factor = checks.integer(
            "method.factor", factor, minimum=1, maximum=features.image_size
        )
        self.crop_scale = _interval("method.crop_scale", crop_scale)
        self.rounding = checks.choice("method.rounding", rounding, _ROUNDING)
        if jpeg_quality is not None:
            checks.integer("method.jpeg_quality", jpeg_quality, minimum=1, maximum=95)
        self.jpeg_quality = jpeg_quality

    def least_real(self, ipc: int) -> int:
        """As many real images as crops, for each gives one."""
        return ipc * self.factor**2

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Write `ipc` images per class below `out`, at the observer's size."""
        times = StageTimes(out / "times.json")
        needed, work = self.least_real(ipc), self.work
        with times.stage("check"):
            inventory = take_inventory(
                dataset, "train", needed, work.cache, work.workers, self.factor**2
            )
        writer = DistilledWriter(out, dataset, ipc, seed)
        left = [
            label
            for label, info in enumerate(dataset.classes)
            if not all(writer.has(info.wnid, k) for k in range(ipc))
        ]
        if left:
            with times.stage("features"):
                observer = self.features.fit(dataset, inventory)
            with times.stage("crops"):
                self._make(observer, left, dataset, inventory, writer)
        writer.finish(provenance, {})
        return DistilledDataset(out)

    def stages(
        self, dataset: RealDataset, ipc: int, out: Path, inventory: Sequence[ClassImages]
    ) -> list[Stage]:
        """What the observer needs first, and the scoring."""
        looked_at = self._looked_at(ipc, inventory)
        return [*self.features.stages(dataset, inventory), self._stage(looked_at)]

    def kept(
        self, observer: Observer, images: Sequence[RealImage], label: int, draws: Draws
    ) -> Crops:
        """The best crop of each image of a class, in their order."""
        size, parts = observer.image_size // self.factor, []

        def cut(image: RealImage) -> Tensor:
            draw, pixels = draws.of(image), from_pil(image.decode()).float() / 255
            crops = [self._crop(pixels, draw, size) for _ in range(self.num_crop)]
            return torch.stack(crops)  # (num_crop, 3, size, size)

        with ThreadPoolExecutor(self.work.workers) as pool:
            for start in range(0, len(images), _TOGETHER):
                crops = torch.stack(list(pool.map(cut, images[start : start + _TOGETHER])))
                logits = observer.observe(crops.flatten(0, 1)).double()  # (n num_crop, classes)
                losses = -logits.log_softmax(dim=1)[:, label].view(crops.shape[:2])
                least, rows = losses.min(dim=1)
                parts.append((crops[torch.arange(len(crops)), rows], least))
                draws.advance(len(crops))
        return Crops(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def tiled(self, crops: Tensor, size: int) -> Tensor:
        """Images (ipc, 3, size, size) in [0, 1] of crops (ipc factor^2, 3, h, w) by rank."""
        sides = [size // self.factor + (i < size % self.factor) for i in range(self.factor)]
        places = iter(crops.chunk(self.factor**2))  # place q: ranks q ipc .. (q + 1) ipc - 1
        rows = [
            torch.cat([F.interpolate(next(places), (height, width)) for width in sides], dim=3)
            for height in sides
        ]
        return torch.cat(rows, dim=2)

    def picture(self, image: Tensor) -> Image.Image:
        """An image (3, H, W) in [0, 1] as its file holds it."""
        values = image * 255
        if self.rounding == "nearest":
            values = values.round()
        picture = to_pil(values.clamp(0, 255).to(torch.uint8))
        if self.jpeg_quality is None:
            return picture
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=self.jpeg_quality)
        return Image.open(file).convert("RGB")

    def _crop(self, pixels: Tensor, draw: Generator, size: int) -> Tensor:
        """RandomResizedCrop of ratio 1, antialiased: (3, size, size) of pixels (3, H, W)."""
        top, left, side = square((pixels.shape[1], pixels.shape[2]), self.crop_scale, draw)
        box = pixels[None, :, top : top + side, left : left + side]
        return F.interpolate(box, (size, size), mode="bilinear", antialias=True)[0]

    def _make(
        self,
        observer: Observer,
        labels: Sequence[int],
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        writer: DistilledWriter,
    ) -> None:
        """Write the images of some classes."""
        ipc, what = writer.ipc, "scoring crops of real images"
        total = self._looked_at(ipc, [inventory[label] for label in labels])
        stage = self._stage(total)
        announce(stage)
        with progress(what, total, "images", stage=stage, pace=self._pace) as advance:
            for label in labels:
                wnid = dataset.classes[label].wnid
                draws = Draws(writer.seed, wnid, advance)
                images = draws.some(inventory[label].images, self._most(ipc))
                kept = self.kept(observer, images, label, draws)
                best = kept.best(ipc * self.factor**2)
                for k, image in enumerate(self.tiled(best.pixels, observer.image_size)):
                    writer.write_image(wnid, k, self.picture(image))

    def _most(self, ipc: int) -> int:
        return max(self.mipc, self.least_real(ipc))

    def _looked_at(self, ipc: int, inventory: Sequence[ClassImages]) -> int:
        return sum(min(len(found.images), self._most(ipc)) for found in inventory)

    @property
    def _pace(self) -> WorkPace:
        own = self.features
        kind = f"{self.num_crop} crops of an image at {own.image_size} px, {type(own).__name__}"
        return WorkPace(self.work.cache, kind, own.device)

    def _stage(self, images: int) -> Stage:
        each = self._pace.seconds
        return Stage(
            what=f"scores {self.num_crop} crops of each of {images:,} real images",
            seconds=None if each is None else each * images,
            shorter="method.mipc=… or method.num_crop=…",
        )


@dataclass(frozen=True)
class Draws:
    """What is drawn for one class, and who is told of images that are scored."""

    seed: int
    wnid: str
    advance: Callable[[int], None]

    def some(self, images: Sequence[RealImage], most: int) -> list[RealImage]:
        """At most `most` of a class's images, in random order."""
        draw = stream(self.seed, self.wnid, "rded images")
        return [images[i] for i in torch.randperm(len(images), generator=draw)[:most]]

    def of(self, image: RealImage) -> Generator:
        """The stream of an image's crops."""
        return stream(self.seed, self.wnid, image.key, "rded crops")


def square(
    shape: tuple[int, int], scale: tuple[float, float], draw: Generator
) -> tuple[int, int, int]:
    """Top, left and side of a random square of (height, width), as torchvision draws its box.

    Its area is a share of the image's, uniform in `scale`; the largest square in the middle where
    none of ten draws fits.
    """
    height, width = shape
    for _ in range(_ATTEMPTS):
        share = torch.empty(()).uniform_(*scale, generator=draw).item()
        side = round(math.sqrt(height * width * share))
        if 0 < side <= min(shape):
            top, left = (
                int(torch.randint(room - side + 1, (), generator=draw)) for room in (height, width)
            )
            return top, left, side
    side = min(shape)
    return (height - side) // 2, (width - side) // 2, side


def _interval(key: str, value: Sequence[float]) -> tuple[float, float]:
    """`UserError` unless the value is two shares, the lower one first."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UserError(f"{key}={value!r} must be [low, high]")
    low, high = (checks.number(key, v, minimum=0, maximum=1) for v in value)
    if low > high:
        raise UserError(f"{key}={list(value)} must be [low, high]")
    return low, high

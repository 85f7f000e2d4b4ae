"""Images as students see them: real test images, and a distilled set's training images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mgd3.data.datasets import RealDataset, RealImage
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import take_inventory
from mgd3.data.pixels import from_pil
from mgd3.runtime.batching import free_bytes
from mgd3.runtime.errors import CorruptFileError
from mgd3.runtime.progress import track
from mgd3.storage.cache import cached
from mgd3.storage.files import whole_file


def student_pixels(image: Image.Image, size: int, resized: int | None = None) -> Tensor:
    """Shorter side to `resized` (None: `size`), centre crop: (3, size, size) uint8.

    The pixels are torchvision's, for `resized` no less than `size`.
    """
    shorter = resized or size
    width, height = (int(shorter * side / min(image.size)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return from_pil(image.crop((left, top, left + size, top + size)))


def read_pixels(images: Sequence[RealImage], size: int, workers: int) -> Iterator[Tensor]:
    """`student_pixels` of each image, decoded by `workers` threads."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda image: student_pixels(image.decode(), size), images)


class TestImages:
    """The «val» split of a real dataset; the label is the class's position in the dataset."""

    __test__ = False  # not a pytest class

    def __init__(self, dataset: RealDataset, cache: Path, workers: int) -> None:
        self.dataset, self.cache, self.workers = dataset, cache, workers
        self._stored: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    def on(
        self, size: int, device: torch.device, resized: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels (N, 3, size, size) uint8 and labels (N,) on `device`; decoded on first use.

        `resized` is the shorter side before the centre crop, None the crop's own.
        """
        key = size, resized or size, device
        if key not in self._stored:
            self._stored[key] = self._read(*key)
        return self._stored[key]

    def _read(self, size: int, resized: int, device: torch.device) -> tuple[Tensor, Tensor]:
        inventory = take_inventory(self.dataset, "val", 1, self.cache, self.workers)
        images = [(i, label) for label, found in enumerate(inventory) for i in found.images]
        with ThreadPoolExecutor(self.workers) as pool:
            decoded = pool.map(lambda pair: student_pixels(pair[0].decode(), size, resized), images)
            pixels = torch.stack(
                list(track(decoded, "reading the test images", len(images), "images"))
            )
        return pixels.to(device), torch.tensor([label for _, label in images], device=device)


log = logging.getLogger(__name__)
_SHARE = 0.25  # of the device's free memory that pixels may take


def training_images(
    distilled: DistilledDataset,
    size: int,
    device: torch.device,
    cache: Path,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A distilled set's pixels (N, 3, size, size) uint8 and labels (N,) on `device`.

    Pixels stay in a file as `held_or_mapped` says.
    """
    entries = distilled.manifest["images"]
    by_wnid = {c.wnid: label for label, c in enumerate(distilled.classes)}
    labels = torch.tensor([by_wnid[entry["wnid"]] for entry in entries], device=device)
    images = (student_pixels(image, size) for image, _ in distilled.images())
    digests = [entry["sha256"] for entry in entries]
    shape = (len(entries), 3, size, size)
    return held_or_mapped(images, shape, digests, device, cache, limit), labels


def held_or_mapped(
    images: Iterable[Tensor],
    shape: tuple[int, ...],
    digests: Sequence[str],
    device: torch.device,
    cache: Path,
    limit: int | None = None,
) -> Tensor:
    """All `images` (3, H, W) uint8 as one tensor of `shape` on `device`.

    More than `limit` bytes (None: a quarter of what is free) stay on the CPU, in a file of `cache`
    that is mapped: the operating system keeps as much of it in memory as there is room.
    `digests` identify the images.
    """
    count = torch.Size(shape).numel()
    counted = track(images, "reading the training images", shape[0], "images")
    if count <= (int(_SHARE * free_bytes(device)) if limit is None else limit):
        return torch.stack(list(counted)).to(device)
    name = hashlib.blake2s(f"{shape}{list(digests)}".encode(), digest_size=8).hexdigest()
    path = cache / "pixels" / f"{name}.uint8"
    return cached(path, {}, lambda: counted, MappedPixels(shape))


@dataclass(frozen=True)
class MappedPixels:
    """Pixels of one shape, nothing but their bytes: a file that is mapped, not read."""

    shape: tuple[int, ...]

    def read(self, path: Path, key: Mapping[str, str]) -> Tensor:
        """The file as a tensor, uint8; what it was made from is in its name."""
        count = torch.Size(self.shape).numel()
        if path.stat().st_size != count:
            raise CorruptFileError(f"{path} is not {count} bytes long")
        mapped = torch.from_file(str(path), shared=True, size=count, dtype=torch.uint8)
        return mapped.view(self.shape)

    def write(self, path: Path, value: Iterable[Tensor], key: Mapping[str, str]) -> Tensor:
        """Image by image, so that they never are in memory together."""
        log.info("the training images stay on disk: %s", path)
        with whole_file(path) as file:
            for image in value:
                file.write(image.numpy().tobytes())
        return self.read(path, key)

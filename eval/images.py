"""Images as students see them: real test images, and a distilled set's training images."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from eval.pixel_files import held_or_mapped
from mgd3.data.datasets import RealDataset, RealImage
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import take_inventory
from mgd3.data.pixels import from_pil

T = TypeVar("T")
_AHEAD = 4  # decoded images that wait, for each thread


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
    yield from _in_threads(lambda image: student_pixels(image.decode(), size), images, workers)


def _in_threads(work: Callable[[T], Tensor], items: Iterable[T], workers: int) -> Iterator[Tensor]:
    """`work` of every item in order, a few ahead of what is asked for: pixels are large."""
    pool, ahead = ThreadPoolExecutor(workers), deque[Future[Tensor]]()
    try:
        for item in items:
            ahead.append(pool.submit(work, item))
            if len(ahead) > _AHEAD * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


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
        made_from = [str(resized), *(digest for found in inventory for digest in found.digests)]
        decoded = _in_threads(
            lambda pair: student_pixels(pair[0].decode(), size, resized), images, self.workers
        )
        shape = (len(images), 3, size, size)
        pixels = held_or_mapped(decoded, shape, made_from, device, self.cache, "test", sys.maxsize)
        return pixels, torch.tensor([label for _, label in images], device=device)


def training_images(
    distilled: DistilledDataset,
    size: int,
    device: torch.device,
    cache: Path,
    workers: int,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A distilled set's pixels (N, 3, size, size) uint8 and labels (N,) on `device`.

    Pixels stay in a file as `held_or_mapped` says.
    """
    entries = distilled.manifest["images"]
    by_wnid = {c.wnid: label for label, c in enumerate(distilled.classes)}
    labels = torch.tensor([by_wnid[entry["wnid"]] for entry in entries], device=device)
    distilled.verify(cache, workers)  # pixels that were kept are those of the manifest's images
    images = _in_threads(
        lambda entry: student_pixels(distilled.image(entry), size), entries, workers
    )
    made_from = [str(size), *(entry["sha256"] for entry in entries)]
    shape = (len(entries), 3, size, size)
    return held_or_mapped(images, shape, made_from, device, cache, "training", limit), labels

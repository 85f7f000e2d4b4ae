"""Image files of one batch, written while the next batch is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image
from torch import Tensor

from mgd3.data.distilled import DistilledWriter
from mgd3.data.pixels import to_pil


class BackgroundWriter:
    """Writes one batch's files while the next is sampled; reduces them to `size` pixels."""

    def __init__(self, writer: DistilledWriter, workers: int, size: int) -> None:
        self._writer, self._size = writer, size
        self._pool = ThreadPoolExecutor(workers)
        self._pending: list[Future[None]] = []

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._pool:
            if kind is None:
                self._wait()

    def write(self, keys: Sequence[tuple[str, int]], pixels: Callable[[], Tensor]) -> None:
        """Begin with a batch once the last one is done.

        `pixels` gives its images (B, 3, H, W) uint8; the threads call it, so that it may wait for
        a device, or raise.
        """
        self._wait()
        self._pending = [
            self._pool.submit(self._write, key, row, pixels) for row, key in enumerate(keys)
        ]

    def _write(self, key: tuple[str, int], row: int, pixels: Callable[[], Tensor]) -> None:
        write_images(self._writer, [key], pixels()[row, None], self._size)

    def _wait(self) -> None:
        """Raises what went wrong while writing."""
        for file in self._pending:
            file.result()


def write_images(
    writer: DistilledWriter, keys: Sequence[tuple[str, int]], pixels: Tensor, size: int
) -> None:
    """Write images (B, 3, H, W) uint8, reduced to `size` pixels."""
    for key, image in zip(keys, pixels, strict=True):
        picture, side = to_pil(image), (size, size)
        if picture.size != side:
            picture = picture.resize(side, Image.Resampling.BICUBIC)
        writer.write_image(*key, picture)

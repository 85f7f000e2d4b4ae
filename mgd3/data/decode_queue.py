"""Images decoded by threads before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from mgd3.data.datasets import RealImage


class DecodeQueue:
    """Pixels of the images of some classes, in the order in which the classes are asked for.

    Pillow lets go of the interpreter's lock while it decodes and resizes, so threads do.
    """

    def __init__(
        self,
        decode: Callable[[RealImage], Tensor],
        workers: int,
        classes: Mapping[str, Sequence[RealImage]],
    ) -> None:
        """`classes` are the images by wnid; what `decode` raises, `take` raises."""
        self._decode = decode
        self._pool = ThreadPoolExecutor(workers)
        self._coming = {wnid: iter(images) for wnid, images in classes.items()}
        self._begun: dict[str, Future[Tensor]] = {}  # by key, in order

    def __enter__(self) -> DecodeQueue:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, images: Sequence[RealImage], ahead: int) -> list[Tensor]:
        """The pixels of these; up to `ahead` more images are decoded while they are used."""
        self._begin(len(images) + ahead)
        ready = [self._begun_with(image) for image in images]
        self._begin(ahead)
        return [pixels.result() for pixels in ready]

    def leave(self, wnid: str, images: Sequence[RealImage]) -> None:
        """Forget a class: its images are taken, or not needed."""
        self._coming.pop(wnid, None)
        for image in images:
            if image.key in self._begun:
                self._begun.pop(image.key).cancel()

    def _begun_with(self, image: RealImage) -> Future[Tensor]:
        if image.key in self._begun:
            return self._begun.pop(image.key)
        return self._pool.submit(self._decode, image)  # a class that nobody expected, or once more

    def _begin(self, most: int) -> None:
        coming = self._images()
        while len(self._begun) < most and (image := next(coming, None)) is not None:
            self._begun[image.key] = self._pool.submit(self._decode, image)

    def _images(self) -> Iterator[RealImage]:
        """Those that are not begun."""
        while self._coming:
            wnid, images = next(iter(self._coming.items()))
            if (image := next(images, None)) is not None:
                yield image
            else:
                del self._coming[wnid]

"""Real images through a codec: decoded ahead of the device, encoded, checked, brought back."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from mgd3.backbones.contract import Codec
from mgd3.data.datasets import RealImage
from mgd3.data.decode_queue import DecodeQueue
from mgd3.data.pixels import center_crop, from_pil, to_unit
from mgd3.runtime.batching import Batches, largest_batch
from mgd3.runtime.compute import HostCopy, to_device
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream

# Fixed on a CPU: a network rounds differently in another batch, and k-means may then differ.
_CHUNK = 16
_AHEAD = 2  # batches that are decoded while one is encoded
# Images (B, 3, H, W) in [-1, 1] and their keys to tensors (B, ...), such as latents.
Encode: TypeAlias = Callable[[Tensor, Sequence[str]], tuple[Tensor, ...]]


def device_of(codec: Codec) -> torch.device:
    """Where a codec computes: the CPU for one that has no network."""
    compute = getattr(codec, "compute", None)
    return compute.torch_device if compute else torch.device("cpu")


class Encoder:
    """Encodes images batch by batch; the device waits neither for files nor for its results.

    Threads decode the next batches, pixels travel as uint8, and a batch's latents come back while
    the next one is encoded. `flip` is LatentCache's.
    """

    def __init__(self, codec: Codec, flip: str) -> None:
        self.codec, self.flip = codec, flip
        self.device = device_of(codec)
        self._batches: Batches | None = None  # as many as memory takes, once that is known

    def queue(self, workers: int, classes: Mapping[str, Sequence[RealImage]]) -> DecodeQueue:
        """Threads that decode the images of some classes for `encode`."""
        return DecodeQueue(self._pixels, workers, classes)

    def encode(
        self,
        images: Sequence[RealImage],
        queue: DecodeQueue,
        encode: Encode,
        advance: Callable[[int], None],
    ) -> Iterator[tuple[Tensor, ...]]:
        """Of one batch after the other what `encode` gives, on the host.

        Raises `UserError` naming an image whose latent is not finite.
        """
        running: deque[tuple[Sequence[RealImage], list[HostCopy]]] = deque()
        for part, encoded in self._launched(images, queue, encode):
            finite = torch.stack([e.flatten(1).isfinite().all(dim=1) for e in encoded])
            running.append((part, [HostCopy(e) for e in (*encoded, finite)]))
            if len(running) == 2:
                yield _arrived(*running.popleft(), advance)
        while running:
            yield _arrived(*running.popleft(), advance)

    def _launched(
        self, images: Sequence[RealImage], queue: DecodeQueue, encode: Encode
    ) -> Iterator[tuple[Sequence[RealImage], tuple[Tensor, ...]]]:
        """Batches with what the device makes of them; it may be at it still."""
        if self._batches is None:
            self._batches = Batches(self._batch_size(encode), "encoding")
        batches, size = self._batches, self._batches.size
        for start in range(0, len(images), size):
            for attempt in batches.attempts(images[start : start + size]):
                with attempt as part:
                    pixels = torch.stack(queue.take(part, _AHEAD * size))
                    on_device = to_unit(to_device(pixels, self.device))  # (B, 3, H, W)
                    encoded = encode(on_device, [image.key for image in part])
                if attempt.error is None:
                    yield part, encoded

    def _batch_size(self, encode: Encode) -> int:
        if self.device.type != "cuda":
            return _CHUNK
        side = self.codec.image_size

        def work(images: int) -> object:
            keys = [""] * images
            return encode(torch.zeros(images, 3, side, side, device=self.device), keys)

        return largest_batch(work, self.device, "encoding")

    def _pixels(self, image: RealImage) -> Tensor:
        """(3, H, W) uint8."""
        pixels = from_pil(center_crop(image.decode(), self.codec.image_size))
        if self.flip == "none":
            return pixels
        mirrored = self.flip == "all" or torch.rand((), generator=stream("flip", image.key)) < 0.5
        return pixels.flip(-1) if mirrored else pixels


def _arrived(
    images: Sequence[RealImage], copies: Sequence[HostCopy], advance: Callable[[int], None]
) -> tuple[Tensor, ...]:
    """A batch's tensors on the host; `UserError` naming one that is not finite."""
    *encoded, finite = copies
    good = finite.get().all(dim=0)  # (B,); the last to arrive: this is the only wait
    if not good.all():
        key = images[int((~good).nonzero()[0])].key
        raise UserError(f"the latent of {key} is not finite; its file or the VAE is bad")
    advance(len(images))
    return tuple(copy.get() for copy in encoded)

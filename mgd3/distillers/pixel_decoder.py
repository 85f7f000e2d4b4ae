"""From latents to the pixels that are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgd3.backbones.contract import Codec
from mgd3.data.pixels import to_pixels
from mgd3.runtime.batching import Batches
from mgd3.runtime.compute import HostCopy
from mgd3.runtime.errors import UserError

_DECODE_BATCH = 16  # a VAE needs far more memory than a step


class PixelDecoder:
    """Decodes a batch's latents, as many at once as memory takes.

    Rounding to pixels and the check for numbers that are none happen where the codec runs; what
    comes to the host is uint8, in one copy that the next batch does not wait for.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._batches = Batches(_DECODE_BATCH, "decoding")

    def __call__(self, latents: Tensor) -> DecodedBatch:
        """Of latents (B, C, h, w)."""
        pixels, finite = [], []
        for attempt in self._batches.attempts(latents):
            with attempt as part, torch.no_grad():
                images = self._codec.decode(part)  # (b, 3, H, W)
                made = to_pixels(images), _finite_rows(images)
            if attempt.error is None:
                pixels.append(made[0])
                finite.append(made[1])
        flags = torch.cat(finite)
        flags &= _finite_rows(latents).to(flags.device)
        return DecodedBatch(HostCopy(torch.cat(pixels)), HostCopy(flags))


class DecodedBatch:
    """The pixels of a batch, on their way to the host."""

    def __init__(self, pixels: HostCopy, finite: HostCopy) -> None:
        self._pixels, self._finite = pixels, finite

    def pixels(self, keys: Sequence[tuple[str, int]]) -> Tensor:
        """The images (B, 3, H, W) uint8 on the CPU, once they are there; from any thread.

        `keys` name the rows' classes and noise streams. Raises `UserError` if a row or its latent
        is not finite.
        """
        _refuse(keys, self._finite.get())
        return self._pixels.get()


def require_finite(keys: Sequence[tuple[str, int]], latents: Tensor) -> None:
    """`UserError` for a row of latents (B, C, h, w) that is not finite; it waits for the device."""
    _refuse(keys, _finite_rows(latents).cpu())


def _refuse(keys: Sequence[tuple[str, int]], finite: Tensor) -> None:
    if not finite.all():
        wnid, k = keys[int((~finite).nonzero()[0])]
        raise UserError(
            f"the sample of class {wnid}, image {k} is not finite: compute.precision=float16 "
            "overflows (use bfloat16), the backbone's weights are bad, or guidance.scale or "
            "sampler.cfg_scale is far too large; nothing of it was written"
        )


def _finite_rows(rows: Tensor) -> Tensor:
    return rows.flatten(1).isfinite().all(dim=1)  # (B,)

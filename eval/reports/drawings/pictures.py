"""Image sheets, as bytes."""

from __future__ import annotations

import base64
import io

from torch import Tensor

from mgd3.data.pixels import to_pil, to_pixels


def grid(images: Tensor, columns: int, pad_value: int = 0, padding: int = 1) -> Tensor:
    """Images (B, 3, H, W) side by side, in rows of `columns`: (3, H', W')."""
    from torchvision.utils import make_grid

    return make_grid(images, nrow=columns, padding=padding, pad_value=pad_value)


def png(pixels: Tensor) -> bytes:
    """Pixels (3, H, W) uint8 as a PNG file's bytes."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sheet(images: Tensor, columns: int) -> bytes:
    """Images (B, 3, H, W) in [-1, 1], in rows of `columns`, as a PNG file's bytes."""
    return png(grid(to_pixels(images), columns, pad_value=255, padding=2))


def data_uri(pixels: Tensor) -> str:
    """An image (3, H, W) uint8 for an HTML page: PNG, or JPEG for photographs' sizes."""
    if pixels.shape[-2] <= 40:
        return png_uri(png(pixels))
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, "JPEG", quality=88)
    return _uri(buffer.getvalue(), "jpeg")


def png_uri(data: bytes) -> str:
    """A PNG file's bytes for an HTML page."""
    return _uri(data, "png")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

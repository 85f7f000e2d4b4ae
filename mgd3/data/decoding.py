"""How a file becomes pixels: one way for real images, distilled sets and images made elsewhere."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

log = logging.getLogger(__name__)

# What Pillow reads by itself. The others call programs (EPS) or are no pictures.
FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "QOI",
    "SGI", "TGA", "TIFF", "WEBP",
)  # fmt: skip


def suffixes() -> frozenset[str]:
    """Lower-case suffixes of the files that `decode` reads, such as .jpg."""
    return frozenset(s for s, kind in Image.registered_extensions().items() if kind in FORMATS)


def decode(source: Path | BinaryIO) -> Image.Image:
    """RGB: EXIF rotation applied, alpha laid on white, deep grey scaled to 8 bits.

    Of a moving picture the first frame. Raises what Pillow raises for a file that is no picture.
    """
    Image.init()  # Pillow knows no format before; the second call does nothing
    known = [f for f in FORMATS if f in Image.OPEN]
    with warnings.catch_warnings():
        # large, but below the size that Pillow takes for an attack
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(source, formats=known) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":
                image = _in_8_bits(np.asarray(image))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return image.convert("RGB")


def _in_8_bits(values: np.ndarray) -> Image.Image:
    """Grey of more bits, by the number of bits that its values take: 8, 12 (cameras) or 16."""
    most = float(values.max(initial=0))
    if values.dtype.kind == "f":
        scaled = values * 255 if most <= 1 else values
        return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))
    shift = 0 if most < 256 else 4 if most < 4096 else 8
    if shift == 4:
        log.warning("a picture's values end at %d: taken for 12 bits", most)
    return Image.fromarray((np.clip(values, 0, 65535) >> shift).astype(np.uint8))


def why_not(error: BaseException) -> str:
    """Why a picture could not be read, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return "sound perhaps, but larger than Pillow takes for safe (Image.MAX_IMAGE_PIXELS)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "no picture"
    text = str(getattr(error, "strerror", None) or error).strip() or type(error).__name__
    return text.splitlines()[0]

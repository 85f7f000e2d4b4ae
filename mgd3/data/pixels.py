"""Between PIL images, uint8 pixels (.., 3, H, W) and images in [-1, 1]."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size x size: halve with BOX while twice too large, then BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(
        (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def from_pil(image: Image.Image) -> Tensor:
    """An RGB image as (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pil(pixels: Tensor) -> Image.Image:
    """Pixels (3, H, W) uint8 as an RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels to images in [-1, 1], float32."""
    return pixels.float() / 127.5 - 1


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] to pixels: clamped, then rounded half up as the released code's files."""
    return ((images.clamp(-1, 1) + 1) * 127.5 + 0.5).to(torch.uint8)

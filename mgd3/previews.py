"""Small pictures of the first modes, kept beside them so that a report needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd3.artifacts import load_tensors, save_tensors
from mgd3.discovery import ClassModes
from mgd3.pixels import center_crop, from_pil, to_pixels
from mgd3.types import Codec

_FILE = "previews.safetensors"
_MOST_CLASSES = 10
_MOST_MODES = 10
_MOST_PIXELS = 64


def save_previews(out: Path, found: Mapping[str, ClassModes], codec: Codec) -> None:
    """Decoded centroids and nearest real images of the first ten modes of ten classes."""
    path = out / "modes" / _FILE
    if path.is_file():
        return
    size = min(codec.image_size, _MOST_PIXELS)
    tensors = {}
    for wnid, modes in list(found.items())[:_MOST_CLASSES]:
        centers = modes.modes.centers[:_MOST_MODES]
        decoded = to_pixels(codec.decode(centers.to(codec.device))).cpu()  # (K, 3, H, W)
        nearest = [from_pil(center_crop(i.decode(), size)) for i in modes.nearest[:_MOST_MODES]]
        tensors[f"{wnid}.centroids"] = _shrink(decoded, size)
        tensors[f"{wnid}.nearest"] = torch.stack(nearest)
    save_tensors(path, tensors, {})


def load_previews(out: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By wnid: centroids and nearest real images, (K, 3, s, s) uint8; empty if there are none."""
    path = out / "modes" / _FILE
    if not path.is_file():
        return {}
    tensors = load_tensors(path)
    wnids = [key.removesuffix(".centroids") for key in tensors if key.endswith(".centroids")]
    return {w: (tensors[f"{w}.centroids"], tensors[f"{w}.nearest"]) for w in wnids}


def _shrink(pixels: Tensor, size: int) -> Tensor:
    if pixels.shape[-1] == size:
        return pixels
    small = F.interpolate(pixels.float(), (size, size), mode="bicubic", antialias=True)
    return small.clamp(0, 255).round().to(torch.uint8)

"""Small pictures of the first modes, kept beside them so that a report needs no network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd3.runtime.errors import CorruptFileError, reading
from mgd3.storage.tensors import load_tensors, save_tensors

MOST_CLASSES = 10
MOST_MODES = 10
MOST_PIXELS = 64

Preview = tuple[Tensor, Tensor]  # centroids and nearest real images, (K, 3, s, s) uint8 each


def preview_path(out: Path) -> Path:
    """Where a distilled dataset's previews lie."""
    return out / "modes" / "previews.safetensors"


def save_previews(out: Path, previews: Mapping[str, Preview]) -> None:
    """Previews by wnid, at most 64 px."""
    tensors: dict[str, Tensor] = {}
    for wnid, (centroids, nearest) in previews.items():
        tensors |= {f"{wnid}.centroids": _shrink(centroids), f"{wnid}.nearest": _shrink(nearest)}
    save_tensors(preview_path(out), tensors, {})


def load_previews(out: Path) -> dict[str, Preview]:
    """Previews by wnid; empty if there are none, or they are damaged."""
    try:
        tensors = load_tensors(preview_path(out))
        with reading(preview_path(out), "it holds no previews", CorruptFileError):
            wnids = [key.removesuffix(".centroids") for key in tensors if ".centroids" in key]
            found = {w: (tensors[f"{w}.centroids"], tensors[f"{w}.nearest"]) for w in wnids}
            for pixels in (part for pair in found.values() for part in pair):
                if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
                    raise ValueError(f"{tuple(pixels.shape)} {pixels.dtype} are no pictures")
                if 0 in pixels.shape:
                    raise ValueError("a picture is empty")
            return found
    except (FileNotFoundError, CorruptFileError):
        return {}


def _shrink(pixels: Tensor) -> Tensor:
    if pixels.shape[-1] <= MOST_PIXELS:
        return pixels
    small = F.interpolate(
        pixels.float(), (MOST_PIXELS, MOST_PIXELS), mode="bicubic", antialias=True
    )
    return small.clamp(0, 255).round().to(torch.uint8)

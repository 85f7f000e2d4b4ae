"""Pictures: image sheets and small plots, as bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from torch import Tensor
from torchvision.utils import make_grid

from mgd3.pixels import to_pil, to_pixels

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def png(pixels: Tensor) -> bytes:
    """Pixels (3, H, W) uint8 as a PNG file's bytes."""
    buffer = io.BytesIO()
    to_pil(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sheet(images: Tensor, columns: int) -> bytes:
    """Images (B, 3, H, W) in [-1, 1], in rows of `columns`, as a PNG file's bytes."""
    return png(make_grid(to_pixels(images), nrow=columns, padding=2, pad_value=255))


def loss_curve(losses: Sequence[float]) -> bytes:
    """Training loss by step, with its mean over 100 steps, as a PNG file's bytes."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(losses, linewidth=0.3, alpha=0.5)
    if len(losses) > 100:
        smooth = np.convolve(losses, np.ones(100) / 100, mode="valid")
        axes.plot(np.arange(99, len(losses)), smooth)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()

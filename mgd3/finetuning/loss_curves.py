"""A training's loss by step, as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


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

"""What a precision changes in the pixels, against float32 on the same weights and noise.

dit_digits is a trained network and its latents are pixels. The golden network and DiT-XL/2 have
random weights; their latents become pixels by one fixed linear map (99.9 % of float32's values span
0..255), so that a grey level means the same for every precision.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from mgd3.backbones.dit import BareDiT, DiT
from mgd3.backbones.weights.dit_weights import from_original
from mgd3.runtime.compute import Compute
from mgd3.sampling.guidance import ModeGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDPM
from mgd3.sampling.terms import SamplingBatch
from mgd3.storage.checkpoints import read_weights
from scripts.timings.sampling import DIGITS, random_dit
from scripts.timings.stopwatch import Report, apart, default_device

_GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden/dit_mode_guidance.pt"


def latents(network: str, images: int, steps: int, compute: Compute) -> np.ndarray:
    """Guided samples (B, C, h, w), from the same noise in every precision."""
    backbone: BareDiT | DiT
    if network == "golden":
        tensors, _ = read_weights("weights", _GOLDEN)
        backbone = BareDiT(compute.place(from_original(tensors, num_heads=4)), compute)
    elif network == "dit_digits":
        backbone = DiT(DIGITS, None, image_size=8, compute=compute)
    else:
        backbone = random_dit(network, compute)
    keys = [("0", k) for k in range(images)]
    return (
        DDPM(steps=steps, cfg_scale=4.0, cfg_channels=3)(
            backbone,
            SamplingBatch(
                class_ids=torch.tensor([k % 10 for k in range(images)], device=backbone.device),
                modes=torch.zeros(images, *backbone.latent_shape, device=backbone.device),
            ),
            ModeGuidance(scale=0.1, stop_t=steps // 2),
            ImageNoise(0, keys, backbone.latent_shape, backbone.device, steps - 1),
        )
        .cpu()
        .numpy()
    )


def main() -> None:
    """A table of pixel differences."""
    device = default_device()
    report = Report("network", "precision", "mean difference", "max", "of 255, pixels")
    jobs = [("dit_digits", 100, 50), ("golden", 50, 50)]
    if device == "cuda":
        jobs.append(("DiT-XL/2", 16, 50))
    for network, images, steps in jobs:
        exact, _ = apart(latents, network, images, steps, Compute(device=device))
        span = (-1.0, 1.0) if network == "dit_digits" else np.percentile(exact, [0.05, 99.95])
        for precision in ("tf32", "bfloat16", "float16"):
            compute = Compute(device=device, precision=precision)
            other, _ = apart(latents, network, images, steps, compute)
            levels = [np.rint(np.interp(x, span, (0, 255))) for x in (exact, other)]
            difference = np.abs(levels[0] - levels[1])
            report.add(
                network, precision, f"{difference.mean():.3f}", f"{difference.max():.0f}",
                f"{difference.size}",
            )  # fmt: skip
        report.section()
    report.show()

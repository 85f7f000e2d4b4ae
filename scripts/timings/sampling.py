"""Sampling: one image at a time, its pair of rows as a batch of two  |  batched.

Both ways embed timesteps and classes once in a forward pass, as facebookresearch/DiT does, and
neither decodes nor writes: the ratio is that of the loops.
"""

from __future__ import annotations

import time

import torch

from mgd3.backbones.dit import BareDiT, DiT
from mgd3.backbones.weights.dit_weights import build_network
from mgd3.runtime.compute import Compute
from mgd3.runtime.machine import keep_freed_memory
from mgd3.sampling.guidance import ModeGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDPM
from mgd3.sampling.terms import SamplingBatch
from scripts.timings.stopwatch import Report, default_device, synchronise

DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"
SIZES = {"DiT-S/2": (384, 12, 6), "DiT-XL/2": (1152, 28, 16)}  # width, depth, heads


def random_dit(name: str, compute: Compute, image_size: int = 256) -> BareDiT:
    """A published size with random weights, in the latent space of `image_size` pixels."""
    torch.manual_seed(0)
    hidden_size, depth, num_heads = SIZES[name]
    network = build_network(
        input_size=image_size // 8,
        patch_size=2,
        in_channels=4,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=1000,
    )
    return BareDiT(compute.place(network), compute)


def sample(backbone: BareDiT | DiT, images: int, batch: int, steps: int) -> float:
    """Seconds per image of guided DDPM sampling in batches."""
    sampler = DDPM(steps=steps, cfg_scale=4.0, cfg_channels=3)
    start = time.perf_counter()
    for first in range(0, images, batch):
        keys = [(str(k % 10), k) for k in range(first, min(first + batch, images))]
        sampler(
            backbone,
            SamplingBatch(
                class_ids=torch.tensor([k % 10 for _, k in keys], device=backbone.device),
                modes=torch.zeros(len(keys), *backbone.latent_shape, device=backbone.device),
            ),
            ModeGuidance(scale=0.1, stop_t=steps // 2),
            ImageNoise(0, keys, backbone.latent_shape, backbone.device, steps - 1),
        )
    synchronise(backbone.device)
    return (time.perf_counter() - start) / images


def sampling(network: str, batch: int, images: int, steps: int, device: str) -> float:
    """Seconds per image; a warm-up of two steps first."""
    if batch > 1:
        keep_freed_memory()  # run.py does; the reference's loop does not
    compute = Compute(device=device)
    backbone = (
        random_dit(network, compute)
        if network in SIZES
        else DiT(DIGITS, None, image_size=8, compute=compute)
    )
    sample(backbone, batch, batch, steps=2)
    return sample(backbone, images, batch, steps)


def main() -> None:
    """A table of seconds per image."""
    device = default_device()
    report = Report("measurement", "seconds", "x reference", "peak MiB")
    images, batch = (100, 50) if device == "cpu" else (1000, 500)
    alone, together = "dit_digits, per image, one pair at a time", f"dit_digits, batch {batch}"
    report.compare(
        [
            (alone, (sampling, "dit_digits", 1, 10, 50, device)),
            (together, (sampling, "dit_digits", batch, images, 50, device)),
        ],
    )
    images, steps = (8, 4) if device == "cpu" else (64, 50)
    alone = f"DiT-S/2, per image, {steps} steps, one pair at a time"
    report.compare(
        [
            (alone, (sampling, "DiT-S/2", 1, 4, steps, device)),
            (f"DiT-S/2, batch {images}", (sampling, "DiT-S/2", images, images, steps, device)),
        ],
    )
    report.show()

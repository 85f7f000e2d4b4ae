"""DiT-XL/2 with random weights: rate by batch, precision and compilation, against the hardware.

The reference's loop is one image at a time, its pair of rows as a batch of two, float32 weights
with TF32 products. The share is of the machine's own measured bfloat16 matrix rate; a step of
DiT-XL/2 at 256 px is two passes of 237 GFLOP per image.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from diffusers import AutoencoderKL

from mgd3.backbones.codecs import VAECodec
from mgd3.runtime.compute import Compute
from mgd3.runtime.machine import keep_freed_memory
from scripts.timings.sampling import SIZES, random_dit, sample
from scripts.timings.stopwatch import Report, apart, default_device, synchronise


def flop(network: str, image_size: int) -> float:
    """Of one forward pass of one image; two per multiplication and addition."""
    width, depth, _ = SIZES[network]
    tokens = (image_size // 16) ** 2
    return 2 * depth * (12 * tokens * width**2 + 2 * tokens**2 * width + 6 * width**2)


def matrix_rate(device: str) -> float:
    """FLOP per second of large bfloat16 matrix products, the best of several."""
    side = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        for _ in range(4):
            torch.matmul(a, b)
        synchronise(torch.device(device))
        seconds.append(time.perf_counter() - start)
    return 4 * 2 * side**3 / min(seconds[1:])


def rate(
    network: str, image_size: int, batch: int, batches: int, steps: int, compute: Compute
) -> float:
    """Seconds per image of `batches` batches after a warm-up."""
    keep_freed_memory()
    backbone = random_dit(network, compute, image_size)
    sample(backbone, batch, batch, steps=2)
    return sample(backbone, batch * batches, batch, steps)


def decoding(image_size: int, batch: int, compute: Compute) -> float:
    """Seconds per image of a Stable Diffusion VAE with random weights."""
    codec = VAECodec(
        lambda: AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512],
            layers_per_block=2,
            latent_channels=4,
        ),
        image_size,
        compute=compute,
    )
    latents = torch.zeros(batch, 4, image_size // 8, image_size // 8, device=compute.torch_device)
    for _ in range(2):
        start = time.perf_counter()
        codec.decode(latents)
        synchronise(compute.torch_device)
    return (time.perf_counter() - start) / batch


def main(
    network: str,
    image_size: int,
    batches: list[int],
    steps: int,
    precisions: list[str],
    compile: bool,  # noqa: A002
) -> None:
    """A table of images per second for sampling, and one for decoding."""
    device = default_device()
    hardware, _ = apart(matrix_rate, device)
    work = flop(network, image_size) * 2 * steps
    report = Report("measurement", "s/image", "images/s", "x reference", "share", "peak MiB")
    first = None
    loop = f"{network}, {image_size} px, {steps} steps, reference's loop"
    jobs = [(loop, 1, 2, Compute(device=device, precision="tf32"))]
    for precision in precisions:
        for compile_ in (False, True) if compile else (False,):
            compute = Compute(device=device, precision=precision, compile=compile_)
            label = f"{precision}{', compiled' if compile_ else ''}"
            jobs += [(f"{label}, batch {batch}", batch, 1, compute) for batch in batches]
    best = ("nothing", math.inf)
    for label, batch, repeats, compute in jobs:
        seconds, memory = apart(rate, network, image_size, batch, repeats, steps, compute)
        if seconds is None:
            report.add(label, "failed")
            continue
        first = first or seconds
        figures = f"{seconds:.3f}", f"{1 / seconds:.3f}", f"{first / seconds:.2f}"
        report.add(label, *figures, f"{work / seconds / hardware:.0%}", f"{memory:.0f}")
        best = min(best, (label, seconds), key=lambda pair: pair[1])
    report.show()
    print(f"best: {best[0]}; measured bfloat16 matrix rate: {hardware / 1e12:.2f} TFLOP/s")

    report = Report("VAE decoding", "s/image", "images/s", "peak MiB")
    batch = min(16, max(batches))
    for precision in precisions:
        for option in (None, "channels_last", "vae_slicing"):
            options: dict[str, Any] = {option: True} if option else {}
            compute = Compute(device=device, precision=precision, **options)
            label = ", ".join([precision, *options, f"batch {batch}"])
            seconds, memory = apart(decoding, image_size, batch, compute)
            if seconds is None:
                report.add(label, "failed")
            else:
                report.add(label, f"{seconds:.3f}", f"{1 / seconds:.3f}", f"{memory:.0f}")
    report.show()

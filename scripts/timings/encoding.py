"""Encoding of photographs: one after another in a DataLoader  |  decoded ahead of the network.

Files of ImageNet's usual size (500 x 375, JPEG) through a Stable Diffusion VAE's encoder with
random weights: of its real width on a GPU, a narrow one on a CPU, so that decoding counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from mgd3.backbones.codecs import VAECodec
from mgd3.data.datasets import ImageTree
from mgd3.data.inventory import take_inventory
from mgd3.data.pixels import center_crop, from_pil
from mgd3.modes.latents import LatentCache
from mgd3.runtime.compute import Compute
from mgd3.runtime.machine import keep_freed_memory
from scripts.timings.stopwatch import Report, apart, default_device

WIDTH, HEIGHT, SIZE = 500, 375, 256
_BATCH = 16  # of the reference's loader
_CLASSES = 2


def write_photographs(folder: Path, images: int) -> None:
    """Crops of the two photographs that ship with scikit-learn, a class from each."""
    from sklearn.datasets import load_sample_images

    draw, sources = np.random.default_rng(0), load_sample_images().images
    for split, count in (("train", images), ("val", _CLASSES)):
        for k in range(count):
            source = Image.fromarray(sources[k % _CLASSES])
            left = int(draw.integers(0, source.width - WIDTH))
            top = int(draw.integers(0, source.height - HEIGHT))
            path = folder / split / str(k % _CLASSES) / f"{k:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            source.crop((left, top, left + WIDTH, top + HEIGHT)).save(path, quality=95)


@cache
def _vae(width: int) -> AutoencoderKL:
    """The first stage of DiT's latents where `width` is 128."""
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[width, 2 * width, 4 * width, 4 * width],
        norm_num_groups=min(32, width),
        layers_per_block=2,
        latent_channels=4,
    )


def decoding(photographs: Path, workers: int) -> float:
    """Seconds per image of decoding alone, as the encoder wants it."""
    from concurrent.futures import ThreadPoolExecutor

    images = [i for found in _inventory(photographs) for i in found.images]
    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(lambda image: from_pil(center_crop(image.decode(), SIZE)), images):
            pass
    return (time.perf_counter() - start) / len(images)


def reference(photographs: Path, width: int, device: str) -> float:
    """Seconds per image of the released loop: a loader's transforms, then the encoder, float32."""
    transform = transforms.Compose(
        [
            transforms.Lambda(lambda image: center_crop(image, SIZE)),
            transforms.ToTensor(),
            transforms.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    data = ImageFolder(str(photographs / "train"), transform)
    vae = _vae(width).to(device).eval()
    with torch.no_grad():
        vae.encode(torch.zeros(_BATCH, 3, SIZE, SIZE, device=device))
        start = time.perf_counter()
        for images, _ in DataLoader(data, batch_size=_BATCH):
            vae.encode(images.to(device)).latent_dist.mean.mul(0.18215).cpu()
    return (time.perf_counter() - start) / len(data)


def ours(photographs: Path, width: int, device: str, workers: int, precision: str) -> float:
    """Seconds per image of all classes, files of latents included."""
    keep_freed_memory()
    compute = Compute(device=device, encoding_precision=precision)
    codec = VAECodec(lambda: _vae(width), SIZE, compute=compute)
    codec.moments(torch.zeros(_BATCH, 3, SIZE, SIZE))
    inventory = _inventory(photographs)
    classes = list(zip(_dataset(photographs).classes, inventory, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        cache_ = LatentCache(Path(folder), codec, "none", workers)
        start = time.perf_counter()
        with cache_.encoding(classes):
            for pair in classes:
                cache_.latents(*pair)
        return (time.perf_counter() - start) / sum(len(found.images) for found in inventory)


def _dataset(photographs: Path) -> ImageTree:
    return ImageTree("folder", None, str(photographs), SIZE)


def _inventory(photographs: Path) -> Sequence:
    return take_inventory(_dataset(photographs), "train", 1, photographs / "cache", 1)


def main(images: int | None, width: int | None, workers: list[int]) -> None:
    """Images per second and the ratio to the reference."""
    device = default_device()
    on_gpu = device == "cuda"
    images, width = images or (4096 if on_gpu else 64), width or (128 if on_gpu else 8)
    precisions = ["float32", *(["tf32"] if on_gpu else []), "bfloat16"]
    report = Report(f"{images} photographs", "images/s", "x reference", "peak MiB")
    with tempfile.TemporaryDirectory() as folder:
        photographs = Path(folder)
        write_photographs(photographs, images)
        for n in workers:
            seconds, memory = apart(decoding, photographs, n)
            report.add(f"decoding alone, {n} threads", _rate(seconds), "", f"{memory:.0f}")
        report.section()
        first, memory = apart(reference, photographs, width, device)
        report.add("reference's loop", _rate(first), "1.00", f"{memory:.0f}")
        for precision in precisions:
            for n in workers:
                seconds, memory = apart(ours, photographs, width, device, n, precision)
                ratio = f"{first / seconds:.2f}" if first and seconds else ""
                report.add(f"{precision}, {n} threads", _rate(seconds), ratio, f"{memory:.0f}")
    report.show()


def _rate(seconds: float | None) -> str:
    return f"{1 / seconds:.1f}" if seconds else "failed"

"""Mode discovery: every finder on classes of a given size, several side by side, as a run does it.

Latents are random, of DiT-XL/2's shape at 256 px; real ones take k-means about as many iterations.
The last column is ImageNet-1K's 1,000 classes at the measured rate.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import torch
from hydra import compose, initialize_config_dir

from benchmarks.measure import Report, apart
from mgd3.assembly import build
from mgd3.config import CONFIGS, register
from mgd3.discovery import cluster

SHAPE = (4, 32, 32)
FINDERS = (
    "kmeans", "kmeans_pooled", "bisecting", "minibatch_kmeans", "gmm", "spectral", "dbscan",
)  # fmt: skip


def seconds_per_class(name: str, images: int, num_modes: int, classes: int, workers: int) -> float:
    """Of `classes` classes, `workers` at a time; never more than `workers` classes' latents."""
    register()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        finder = build(compose("config", overrides=[f"modes={name}"]), "modes")

    def one(seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        cluster(finder, torch.randn(images, *SHAPE, generator=draw), num_modes)

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, range(classes)))
    return (time.perf_counter() - start) / classes


def main(num_modes: int, workers: int) -> None:
    """A table for 300 and 1,300 images per class."""
    report = Report("finder", "images", "modes", "s per class", "peak MiB", "1,000 classes")
    for images in (300, 1300):
        for name in FINDERS:
            seconds, memory = apart(
                seconds_per_class, name, images, num_modes, 2 * workers, workers
            )
            if seconds is None:
                report.add(name, "failed")
                continue
            total = f"{1000 * seconds / 60:.0f} min" if images == 1300 else ""
            report.add(name, str(images), str(num_modes), f"{seconds:.2f}", f"{memory:.0f}", total)
        report.section()
    report.show()

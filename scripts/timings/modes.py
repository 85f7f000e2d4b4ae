"""Mode discovery: every finder on classes of a given size, several side by side, as a run does it.

Latents are a run's cached ones, or random, of DiT-XL/2's shape at 256 px. The last column is
ImageNet-1K's 1,000 classes at the rate of 1,300 random latents.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from mgd3.config.build import build
from mgd3.config.identity import register
from mgd3.config.schema import CONFIGS
from mgd3.modes.discovery import cluster
from mgd3.runtime.errors import UserError
from mgd3.storage.tensors import load_tensors
from scripts.timings.stopwatch import Report, apart

SHAPE = (4, 32, 32)
FINDERS = (
    "random_real", "kmeans", "kmeans_closest", "kmeans_pooled", "minibatch_kmeans", "bisecting",
    "gmm", "spectral", "dbscan",
)  # fmt: skip


def seconds_per_class(
    name: str, classes: Sequence[Path | int], num_modes: int, workers: int
) -> float:
    """Of classes given by their latents' file or by a number of random ones.

    `workers` are clustered at a time, and never more than their latents are held.
    """
    register()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        finder = build(compose("config", overrides=[f"modes={name}"]), "modes")

    def one(source: Path | int) -> None:
        if isinstance(source, Path):
            latents = load_tensors(source)["latents"]
        else:
            latents = torch.randn(source, *SHAPE, generator=torch.Generator().manual_seed(0))
        cluster(finder, latents, num_modes)

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, classes))
    return (time.perf_counter() - start) / len(classes)


def main(latents: Path | None, num_modes: Sequence[int], workers: int) -> None:
    """A table for the files in `latents`, or for 300 and 1,300 random ones per class."""
    report = Report("finder", "classes", "modes", "s per class", "peak MiB", "1,000 classes")
    cases: dict[str, Sequence[Path | int]] = {
        f"{2 * workers} x {n:,}": [n] * (2 * workers) for n in (300, 1300)
    }
    if latents:
        cases = {latents.name: sorted(latents.glob("*.safetensors"))}
        if not cases[latents.name]:
            raise UserError(f"--latents {latents} holds no .safetensors file")
    for (what, classes), k in product(cases.items(), num_modes):
        for name in FINDERS:
            seconds, memory = apart(seconds_per_class, name, classes, k, workers)
            if seconds is None:
                report.add(name, "failed")
                continue
            total = f"{1000 * seconds / 60:.0f} min" if classes[0] == 1300 else ""
            report.add(name, what, str(k), f"{seconds:.2f}", f"{memory:.0f}", total)
        report.section()
    report.show()

"""Real images as a distilled dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgd3.datasets import RealDataset, RealImage
from mgd3.distilled import DistilledDataset, DistilledWriter


def copy_images(
    dataset: RealDataset,
    ipc: int,
    seed: int,
    out: Path,
    provenance: Mapping[str, Any],
    chosen: Mapping[str, Sequence[RealImage]],
    masses: Mapping[str, Sequence[float]] | None = None,
) -> DistilledDataset:
    """Copy the chosen images of each class, by wnid, to `out`, at their original resolution."""
    writer = DistilledWriter(out, dataset, ipc, seed)
    for wnid, images in chosen.items():
        for index, image in enumerate(images):
            if not writer.has(wnid, index):
                writer.write_image(wnid, index, image.decode())
    sources = {w: [i.key for i in images] for w, images in chosen.items()}
    writer.finish(provenance, sources, masses=masses)
    return DistilledDataset(out)

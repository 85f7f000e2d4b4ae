"""Distillation by selection: real images, copied."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mgd3.backbones.contract import Backbone
from mgd3.data.datasets import RealDataset, RealImage
from mgd3.data.distilled import DistilledDataset, DistilledWriter
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.distillers.parts import OfRealImages
from mgd3.modes.discovery import discover_modes, mode_stages
from mgd3.modes.finders import ModeFinder
from mgd3.runtime.compute import Work
from mgd3.runtime.seeding import stream
from mgd3.runtime.stages import Stage

_COPYING = 0.02  # seconds an image


class RandomReal(OfRealImages):
    """A seeded random subset of each class, without replacement, at its original resolution."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Copy `ipc` images per class to `out`."""
        inventory = take_inventory(dataset, "train", ipc, self.work.cache, self.work.workers)
        chosen = {}
        for info, found in zip(dataset.classes, inventory, strict=True):
            draw = stream(seed, info.wnid, "random real")
            rows = torch.randperm(len(found.images), generator=draw)[:ipc]
            chosen[info.wnid] = [found.images[i] for i in rows]
        return copy_images(dataset, ipc, seed, out, provenance, chosen)

    def stages(
        self, dataset: RealDataset, ipc: int, out: Path, inventory: Sequence[ClassImages]
    ) -> list[Stage]:
        """The copying."""
        return [copying(len(dataset.classes) * ipc, "drawn at random")]


class FullReal:
    """Every training image: the upper bound that a student trained on a distilled set has.

    Its images per class are those of the largest class, whatever `ipc` says.
    """

    def __init__(self, work: Work) -> None:
        self.work = work

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Copy all images to `out`; neither `ipc` nor the seed has a part in it."""
        inventory = take_inventory(dataset, "train", 1, self.work.cache, self.work.workers)
        chosen = {
            info.wnid: found.images for info, found in zip(dataset.classes, inventory, strict=True)
        }
        return copy_images(dataset, max(map(len, chosen.values())), seed, out, provenance, chosen)

    def per_class(self, inventory: Sequence[ClassImages]) -> list[int]:
        """How many images of each class a set has."""
        return [len(found.images) for found in inventory]

    def stages(
        self, dataset: RealDataset, ipc: int, out: Path, inventory: Sequence[ClassImages]
    ) -> list[Stage]:
        """The copying."""
        return [copying(sum(self.per_class(inventory)), "all there are")]


class FirstFiles(OfRealImages):
    """The first images of each class in the order of their names: the literature's «random»."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Copy `ipc` images per class to `out`; the seed has no part in it."""
        inventory = take_inventory(dataset, "train", ipc, self.work.cache, self.work.workers)
        chosen = {
            info.wnid: found.images[:ipc]
            for info, found in zip(dataset.classes, inventory, strict=True)
        }
        return copy_images(dataset, ipc, seed, out, provenance, chosen)

    def stages(
        self, dataset: RealDataset, ipc: int, out: Path, inventory: Sequence[ClassImages]
    ) -> list[Stage]:
        """The copying."""
        return [copying(len(dataset.classes) * ipc, "the first of each class")]


class ClosestReal(OfRealImages):
    """The real image nearest to each mode: mode discovery without generation (Table 5, row 1)."""

    def __init__(self, backbone: Backbone, modes: ModeFinder, work: Work) -> None:
        self.backbone = backbone
        self.mode_finder = modes
        self.work = work

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Copy `ipc` images per class to `out`; the seed has no part in it."""
        found = discover_modes(dataset, self.backbone.codec, self.mode_finder, ipc, self.work, out)
        chosen = {wnid: modes.nearest for wnid, modes in found.items()}
        masses = {wnid: modes.modes.masses for wnid, modes in found.items()}
        return copy_images(dataset, ipc, seed, out, provenance, chosen, masses)

    def stages(
        self, dataset: RealDataset, ipc: int, out: Path, inventory: Sequence[ClassImages]
    ) -> list[Stage]:
        """The modes, and the copying."""
        pairs = list(zip(dataset.classes, inventory, strict=True))
        codec, finder = self.backbone.codec, self.mode_finder
        found = mode_stages(codec, finder, ipc, self.work, out, pairs)
        return [*found, copying(len(dataset.classes) * ipc, "nearest to the modes")]


def copying(images: int, which: str) -> Stage:
    """Copying so many images, which takes no time worth a word."""
    return Stage(what=f"copies {images:,} real images, {which}", seconds=_COPYING * images)


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

"""Real images chosen in a feature space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.distillers.parts import FeatureSpace, OfRealImages
from mgd3.distillers.real_images import copy_images, copying
from mgd3.runtime.compute import Work
from mgd3.runtime.stages import Stage, stages_of
from mgd3.storage.timing import StageTimes


class _Coreset(OfRealImages):
    """Copies what `choose` picks in each class."""

    def __init__(self, features: FeatureSpace, work: Work) -> None:
        self.features = features
        self.work = work

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Copy `ipc` images per class to `out`; the seed has no part in it."""
        times = StageTimes(out / "times.json")
        with times.stage("check"):
            inventory = take_inventory(dataset, "train", ipc, self.work.cache, self.work.workers)
        with times.stage("features"):
            extract = self.features.fit(dataset, inventory)
            chosen = {
                info.wnid: [found.images[row] for row in self.choose(extract.real(label), ipc)]
                for label, (info, found) in enumerate(zip(dataset.classes, inventory, strict=True))
            }
        return copy_images(dataset, ipc, seed, out, provenance, chosen)

    def stages(
        self, dataset: RealDataset, ipc: int, out: Path, inventory: Sequence[ClassImages]
    ) -> list[Stage]:
        """What the features need first, and the copying."""
        first = stages_of(self.features, dataset, inventory)
        return [*first, copying(len(dataset.classes) * ipc, "chosen by their features")]

    def choose(self, features: Tensor, count: int) -> list[int]:
        """`count` different rows of features (N, D)."""
        raise NotImplementedError


class Herding(_Coreset):
    """The k-th image brings the chosen ones' sum closest to (k + 1) mu."""

    def choose(self, features: Tensor, count: int) -> list[int]:
        """argmin_i ||(k + 1) mu - S - f_i|| over the rows left, S the sum of the chosen ones."""
        features = features.double()
        mean, total = features.mean(dim=0), torch.zeros_like(features[0])
        left = torch.ones(len(features), dtype=torch.bool)
        rows: list[int] = []
        for k in range(count):
            gap = ((k + 1) * mean - total - features).norm(dim=1)  # (N,)
            row = int(gap.masked_fill(~left, torch.inf).argmin())
            rows.append(row)
            left[row] = False
            total += features[row]
        return rows


class KCenter(_Coreset):
    """Farthest-first from the image nearest to the class's mean: at most twice the best radius."""

    def choose(self, features: Tensor, count: int) -> list[int]:
        """Each next row is the one farthest from all that are chosen."""
        features = features.double()
        rows = [int((features - features.mean(dim=0)).norm(dim=1).argmin())]
        gap = (features - features[rows[0]]).norm(dim=1)  # to the nearest chosen row
        left = torch.ones(len(features), dtype=torch.bool)
        left[rows[0]] = False
        while len(rows) < count:
            row = int(gap.masked_fill(~left, -1).argmax())
            rows.append(row)
            left[row] = False
            gap = torch.minimum(gap, (features - features[row]).norm(dim=1))
        return rows

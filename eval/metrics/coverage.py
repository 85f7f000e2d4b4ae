"""Which hidden modes a distilled set holds, where a dataset knows what its classes consist of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, cast

import torch
from torch import Tensor

from eval.metrics.features import StudentExtractor, StudentFeatures
from eval.results.layout import NONE, Layout
from eval.results.statistics import Scores, compare, interval, units
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import take_inventory
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import track


class DatasetOfParts(Protocol):
    """A dataset whose classes are known to consist of others' classes."""

    classes: tuple[ClassInfo, ...]
    parts: RealDataset

    def parts_of(self, label: int) -> list[int]:
        """Labels of `parts` that a class consists of."""


@dataclass(frozen=True, kw_only=True)
class SetCoverage:
    """One set: what a network that knows the hidden modes says of its images."""

    covered: int  # hidden modes with an image that is recognised as theirs, in their own class
    modes: int  # how many there are
    evenness: float  # entropy of a class's recognised modes over the largest possible; mean
    foreign: float  # share of images recognised as a mode of another class
    images: int
    distance: float  # mean Euclidean distance of features to the nearest real one of the mode
    counts: list[int]  # images by hidden mode, in their own class
    seed: int | None  # distillation seed


class HiddenModes(StudentFeatures):
    """A network trained on the hidden modes as classes by the hard-label recipe, once per cache."""

    def of(self, dataset: RealDataset) -> Coverage:
        """The measure for sets of `dataset`; `UserError` if it does not say what it consists of."""
        if not hasattr(dataset, "parts"):
            raise UserError(
                f"metrics=coverage: dataset={dataset.name} does not say which hidden modes its "
                "classes have; dataset=digits_parity does"
            )
        known, place = cast("DatasetOfParts", dataset), self.student.place
        inventory = take_inventory(known.parts, "train", 1, place.cache, place.workers)
        return Coverage(known, self.fit(known.parts, inventory))


class Coverage:
    """Measures sets of one dataset."""

    def __init__(self, dataset: DatasetOfParts, network: StudentExtractor) -> None:
        self.dataset, self.network = dataset, network
        self.real = [network.real(mode) for mode in range(len(dataset.parts.classes))]  # (N, D)

    def __call__(self, distilled: DistilledDataset) -> SetCoverage:
        """What a finished set holds."""
        images, labels = zip(*distilled.images(), strict=True)
        features, logits = self.network(images)
        found = logits.argmax(dim=1)  # (B,)
        own = [self.dataset.parts_of(label) for label in range(len(self.dataset.classes))]
        counts = torch.zeros(len(self.real), dtype=torch.long)
        foreign = 0
        for mode, label in zip(found.tolist(), labels, strict=True):
            if mode in own[label]:
                counts[mode] += 1
            else:
                foreign += 1
        far = [
            torch.cdist(f[None], self.real[mode]).min().item()
            for f, mode in zip(features, found.tolist(), strict=True)
        ]
        modes = [mode for parts in own for mode in parts]
        return SetCoverage(
            covered=sum(int(counts[mode]) > 0 for mode in modes),
            modes=len(modes),
            evenness=fmean(_evenness(counts[parts]) for parts in own),
            foreign=foreign / len(labels),
            images=len(labels),
            distance=fmean(far),
            counts=counts.tolist(),
            seed=distilled.manifest.get("seed"),
        )


def measure_coverage(
    methods: Mapping[str, Sequence[DistilledDataset]], coverage: Coverage, what: str
) -> dict[str, list[SetCoverage]]:
    """Every set of each method, by its name."""
    pairs = [(name, distilled) for name, found in methods.items() for distilled in found]
    measured: dict[str, list[SetCoverage]] = {name: [] for name in methods}
    for name, distilled in track(pairs, f"looking for hidden modes, {what}", len(pairs), "sets"):
        measured[name].append(coverage(distilled))
    return measured


def expected_covered(images: int, modes: int) -> float:
    """Modes hit by independent uniform draws: m (1 - (1 - 1/m)^n)."""
    return modes * (1 - (1 - 1 / modes) ** images)


def coverage_layout(
    measured: Mapping[str, Sequence[SetCoverage]], title: str, reference: str = "unguided"
) -> Layout:
    """A line per method: means over sets with 95 % intervals, and paired with `reference`."""
    first = next(iter(measured.values()))[0]
    columns: dict[str, list[str]] = {"method": list(measured), "sets": []}
    names = (f"modes covered of {first.modes}", "minus reference", "evenness", "foreign, %")
    columns |= {name: [] for name in (*names, "distance to the mode")}
    theirs = covered_scores(measured.get(reference, ()))
    for method, sets in measured.items():
        mine = covered_scores(sets)
        difference = compare(mine, theirs) if theirs and method != reference else None
        columns["sets"].append(str(len(sets)))
        columns[names[0]].append(_with_interval(units(mine)))
        columns[names[1]].append(difference.text(2) if difference else "")
        columns[names[2]].append(f"{fmean(s.evenness for s in sets):.2f}")
        columns[names[3]].append(f"{100 * fmean(s.foreign for s in sets):.1f}")
        columns["distance to the mode"].append(f"{fmean(s.distance for s in sets):.2f}")
    renamed = {("minus " + reference if k == names[1] else k): v for k, v in columns.items()}
    return Layout.of_columns(title, renamed)


def _evenness(counts: Tensor) -> float:
    """Entropy of a class's images over its hidden modes, 1 if all have equally many."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    shares = [c / total for c in counts.tolist() if c]
    most = math.log(min(len(counts), total))
    return -sum(s * math.log(s) for s in shares) / most if most else 1.0


def covered_scores(sets: Sequence[SetCoverage]) -> Scores:
    """Modes covered by distillation seed."""
    found: dict[int | None, list[float]] = {}
    for made in sets:
        found.setdefault(made.seed, []).append(float(made.covered))
    return found


def _with_interval(values: Sequence[float]) -> str:
    mean, low, high = interval(values)
    ends = f"{low:.2f}, {high:.2f}" if len(values) > 1 else NONE
    return f"{mean:.2f} [{ends}]"

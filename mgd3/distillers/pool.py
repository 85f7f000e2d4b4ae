"""Which of m x IPC candidates a class keeps.

Candidate c belongs to mode c % IPC and draws from noise stream c; candidates below IPC are the
images of a run without a pool. A selection sees all of them; most of those here keep one for each
mode, so that every mode stays covered.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.distillers.parts import FeatureExtractor, FeatureSpace
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.stages import Stage, stages_of


def checked(chosen: object, candidates: int, ipc: int, selection: object) -> list[int]:
    """What a selection chose, as plain numbers.

    Raises `UserError` unless these are `ipc` different ones of the `candidates`.
    """
    found = list(chosen) if isinstance(chosen, Sequence | np.ndarray) else []
    numbers = [operator.index(c) for c in found if hasattr(c, "__index__")]
    right = len(set(numbers)) == ipc and all(0 <= c < candidates for c in numbers)
    if len(found) != ipc or not right:
        kind = type(selection)
        raise UserError(
            f"select: {kind.__module__}.{kind.__name__} chose {chosen!r} of {candidates} "
            f"candidates; it must return {ipc} different numbers from 0 to {candidates - 1} "
            "(docs/extending.md)"
        )
    return numbers


class FirstCandidates:
    """The first of each mode: what a run without a pool makes."""

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> None:
        """Nothing to learn."""

    def __call__(self, candidates: Sequence[Image.Image], label: int, ipc: int) -> list[int]:
        """0 .. ipc - 1."""
        return list(range(ipc))


class _Measured:
    """Choices by a network trained on the full real set."""

    def __init__(self, features: FeatureSpace | None) -> None:
        if features is None:
            raise UserError(
                "select: this selection measures in a feature space; add features=student"
            )
        self._features = features
        self.extract: FeatureExtractor | None = None

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> None:
        """Train the network, unless the cache has it."""
        self.extract = self._features.fit(dataset, inventory)

    def stages(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> list[Stage]:
        """What the features need first."""
        return stages_of(self._features, dataset, inventory)

    def __call__(self, candidates: Sequence[Image.Image], label: int, ipc: int) -> list[int]:
        """What `choose` takes."""
        assert self.extract is not None, "fit first"
        features, logits = self.extract(candidates)
        return self.choose(features.double(), logits.double(), label, ipc)

    def choose(self, features: Tensor, logits: Tensor, label: int, ipc: int) -> list[int]:
        """By features (m ipc, D) and logits (m ipc, classes)."""
        raise NotImplementedError


class _Judged(_Measured):
    """Choices by a network that tells the classes apart."""

    def __init__(self, features: FeatureSpace | None) -> None:
        """Raises `UserError` for a feature space that knows no classes."""
        super().__init__(features)
        if not getattr(features, "knows_classes", True):
            raise UserError(
                f"select: {type(features).__name__} is no network that knows the classes; "
                "add features=student"
            )


class Probable(_Judged):
    """CaO2's first stage: of the whole pool those taken for their class, by how surely.

    `order` is that of their largest probability: «descending» keeps the easiest, «ascending» the
    hardest of them. Where they are too few, those taken for another class follow in the same order.
    """

    def __init__(self, order: str, features: FeatureSpace | None) -> None:
        """Raises `UserError` for another order or a feature space that knows no classes."""
        super().__init__(features)
        self.order = checks.choice("select.order", order, ["descending", "ascending"])

    def choose(self, features: Tensor, logits: Tensor, label: int, ipc: int) -> list[int]:
        """By features (m ipc, D) and logits (m ipc, classes); equal ones keep their order."""
        sure = logits.softmax(dim=1).amax(dim=1)  # (m ipc,)
        ordered = sure.argsort(descending=self.order == "descending", stable=True)
        right = (logits.argmax(dim=1) == label)[ordered]
        found: list[int] = torch.cat([ordered[right], ordered[~right]])[:ipc].tolist()
        return found


class TeacherCorrect(_Judged):
    """The first of each mode that the teacher takes for its class.

    Where it takes none, the one that it finds most probable.
    """

    def choose(self, features: Tensor, logits: Tensor, label: int, ipc: int) -> list[int]:
        """By features (m ipc, D) and logits (m ipc, classes)."""
        right = (logits.argmax(dim=1) == label).view(-1, ipc)  # (m, ipc)
        probable = logits.softmax(dim=1)[:, label].view(-1, ipc)
        rows = torch.where(right.any(dim=0), right.int().argmax(dim=0), probable.argmax(dim=0))
        return (rows * ipc + torch.arange(ipc)).tolist()


class Diverse(_Measured):
    """Mode by mode the candidate farthest from all that are chosen; the first mode's first one."""

    def choose(self, features: Tensor, logits: Tensor, label: int, ipc: int) -> list[int]:
        """By features (m ipc, D) and logits (m ipc, classes)."""
        chosen = [0]
        for k in range(1, ipc):
            gaps = torch.cdist(features[k::ipc], features[chosen]).amin(dim=1)  # (m,)
            chosen.append(int(gaps.argmax()) * ipc + k)
        return chosen


class Moments(_Measured):
    """The set whose features have the real class's mean and deviation (after D3HR).

    Minimises ||mean - mean_real||^2 + ||std - std_real||^2 over the features, exchanging one
    candidate at a time from the first set on until no exchange helps.
    """

    def choose(self, features: Tensor, logits: Tensor, label: int, ipc: int) -> list[int]:
        """By features (m ipc, D) and logits (m ipc, classes)."""
        assert self.extract is not None, "fit first"
        real = self.extract.real(label).double()
        mean, std = real.mean(dim=0), real.std(dim=0, correction=0)

        def misfit(rows: list[int]) -> float:
            mine = features[rows]
            gap = mine.mean(dim=0) - mean, mine.std(dim=0, correction=0) - std
            return (gap[0].square().sum() + gap[1].square().sum()).item()

        chosen, best = list(range(ipc)), misfit(list(range(ipc)))
        improved = True
        while improved:
            improved = False
            for k in range(ipc):
                for row in range(k, len(features), ipc):
                    trial = [*chosen[:k], row, *chosen[k + 1 :]]
                    if (value := misfit(trial)) < best:
                        chosen, best, improved = trial, value, True
        return chosen

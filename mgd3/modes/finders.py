"""Mode discovery: representative points of one class's latents (paper section 4.1).

A finder takes latents (N, C, h, w) and returns K = `num_modes` modes, N >= K. The paper's stands
here; those that it is compared with in Table 7, and other methods', in alternatives.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mgd3.runtime import checks


@dataclass(frozen=True, kw_only=True)
class Modes:
    """The modes of one class; rows follow the mode finder's order."""

    centers: Tensor  # (K, C, h, w) float32
    counts: Tensor  # (K,) int64, real images per mode
    assignment: Tensor  # (N,) int64, each real image's mode; -1 for one that a finder leaves out
    nearest: Tensor  # (K,) int64, the real image nearest to each center

    @property
    def masses(self) -> list[float]:
        """Each mode's share of the real images that belong to any."""
        return (self.counts / self.counts.sum()).tolist()

    def masses_of(self, stood_for: Sequence[int]) -> list[float]:
        """The shares of images that stand for these modes.

        Images of one mode share its mass; where modes have no image, the others' masses grow to
        their whole sum.
        """
        times = Counter(stood_for)
        if len(times) == len(stood_for) == len(self.counts):  # one image for each mode
            return [self.masses[k] for k in stood_for]
        whole = sum(self.masses[k] for k in times)
        if whole == 0:  # modes of no image, as of duplicate photographs
            return [1 / len(stood_for)] * len(stood_for)
        return [self.masses[k] / times[k] / whole for k in stood_for]


class ModeFinder(Protocol):
    """Finds K representative points of one class's latents (paper section 4.1).

    One that needs more than K images has `shortfall(count, num_modes)`: why so many are too few, or
    None.
    """

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w), N >= num_modes."""


class KMeansModes:
    """scikit-learn's KMeans on raw scaled latents; mode k is its k-th cluster centre.

    The released code's settings: k-means++ with one start, random_state 0, Lloyd, no weights and
    no standardisation. Centres keep scikit-learn's order. `center`: the «centroid» (paper), or the
    real latent «closest» to it (the released `--closest_point`, ties to the first).
    """

    def __init__(
        self,
        random_state: int = 0,
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        center: str = "centroid",
    ) -> None:
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)
        self.n_init = checks.integer("modes.n_init", n_init, minimum=1)
        self.max_iter = checks.integer("modes.max_iter", max_iter, minimum=1)
        self.tol = checks.number("modes.tol", tol, minimum=0)
        self.center = checks.choice("modes.center", center, ["centroid", "closest"])

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        from sklearn.cluster import KMeans  # a second to import

        kmeans = KMeans(
            n_clusters=num_modes,
            random_state=self.random_state,
            n_init=self.n_init,
            max_iter=self.max_iter,
            tol=self.tol,
        ).fit(points(latents))
        centers = torch.from_numpy(kmeans.cluster_centers_).to(latents).view(-1, *latents.shape[1:])
        modes = modes_at(latents, centers, torch.from_numpy(kmeans.labels_).long())
        if self.center == "centroid":
            return modes
        return modes_at(latents, latents[modes.nearest], modes.assignment)


def points(latents: Tensor) -> np.ndarray:
    """(N, C h w) float32."""
    return latents.flatten(1).numpy()


def distances(latents: Tensor, centers: Tensor) -> Tensor:
    """Euclidean, (N, K)."""
    return torch.cdist(latents.flatten(1), centers.flatten(1))


def modes_at(latents: Tensor, centers: Tensor, assignment: Tensor) -> Modes:
    """Modes with the real latent nearest to each centre (ties to the first)."""
    return Modes(
        centers=centers.contiguous(),
        counts=assignment.bincount(minlength=len(centers)),
        assignment=assignment,
        nearest=distances(latents, centers).argmin(dim=0),
    )

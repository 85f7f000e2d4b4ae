"""VLCP's mode finder (ICCV 2025): k-means on what an outlier filter leaves of a class."""

from __future__ import annotations

import math

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.neighbors import LocalOutlierFactor
from torch import Tensor

from mgd3.modes.finders import Modes, distances, points
from mgd3.runtime import checks


class FilteredKMeansModes:
    """The images of least local density (local outlier factor) are left out, then k-means.

    What is left out belongs to no mode: its `assignment` is -1, and no mode counts it.
    """

    def __init__(
        self, n_neighbors: int, contamination: float, n_init: int, random_state: int
    ) -> None:
        """`contamination` is the share that is left out; 0 filters nothing."""
        self.n_neighbors = checks.integer("modes.n_neighbors", n_neighbors, minimum=1)
        share = checks.number("modes.contamination", contamination, minimum=0, maximum=0.5)
        self.contamination = share
        self.n_init = checks.integer("modes.n_init", n_init, minimum=1)
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)

    def shortfall(self, count: int, num_modes: int) -> str | None:
        """Why `count` images of a class are too few for `num_modes` modes; None if they are not."""
        if not self.contamination:
            return None
        if count > self.n_neighbors and count - self._outliers(count) >= num_modes:
            return None
        return (
            f"too few for ipc={num_modes}: its outlier filter needs more images than "
            f"modes.n_neighbors={self.n_neighbors}, and {num_modes} left over by "
            f"modes.contamination={self.contamination:g}. Add images, lower ipc or these keys, or "
            "choose another modes="
        )

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w); N as `shortfall` asks for."""
        rows = points(latents)
        inside = np.flatnonzero(self._inliers(rows))  # (N',)
        kmeans = KMeans(num_modes, n_init=self.n_init, random_state=self.random_state).fit(
            rows[inside]
        )
        centers = torch.from_numpy(kmeans.cluster_centers_).to(latents).view(-1, *latents.shape[1:])
        kept = torch.from_numpy(inside)
        labels = torch.from_numpy(kmeans.labels_).long()
        return Modes(
            centers=centers.contiguous(),
            counts=labels.bincount(minlength=num_modes),
            assignment=torch.full((len(latents),), -1).scatter(0, kept, labels),
            nearest=kept[distances(latents[kept], centers).argmin(dim=0)],
        )

    def _inliers(self, rows: np.ndarray) -> np.ndarray:
        """Which of rows (N, n) stay, (N,) bool."""
        if not self.contamination:
            return np.ones(len(rows), dtype=bool)
        found = LocalOutlierFactor(n_neighbors=self.n_neighbors, contamination=self.contamination)
        return found.fit_predict(rows) == 1

    def _outliers(self, count: int) -> int:
        """How many of `count` are below the percentile at which scikit-learn cuts, at most."""
        return math.ceil(self.contamination * (count - 1))

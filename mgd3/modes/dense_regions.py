"""CoDA's mode finder (ICLR 2026): real images from the dense regions of a class."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import combinations
from threading import Lock

import numpy as np
import torch
from sklearn.cluster import HDBSCAN, KMeans
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mgd3.modes.finders import Modes, points
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

_FEWEST = 10  # images below which a class is clustered as it is, without UMAP
_SHRINK = 0.75  # of the least size, before each round of forced splits
_UMAP = Lock()  # its compiled loops may not be entered by two threads at once

Halves = Callable[[np.ndarray, np.ndarray], list[np.ndarray]]


class DenseRegionModes:
    """Standardised latents, reduced by UMAP and clustered by HDBSCAN; a mode is a real latent.

    Of more clusters than K the largest are kept. Fewer are made more in three rounds: (1) the
    largest are halved where HDBSCAN finds denser parts inside, by 2-means from the best pair of
    their three largest; (2) points that belong to no cluster are clustered by k-means; (3) the
    largest are halved by 2-means, the least size that is allowed shrinking until there are K.
    Points left over count for the nearest cluster.
    """

    def __init__(
        self,
        components: int,
        n_neighbors: int,
        min_dist: float,
        min_cluster_size: int,
        min_samples: int,
        center: str,
        random_state: int,
    ) -> None:
        """`center`: the most «probable» member by HDBSCAN, or the one «nearest» to the mean.

        Raises `UserError` where umap-learn is not installed.
        """
        self.components = checks.integer("modes.components", components, minimum=1)
        self.n_neighbors = checks.integer("modes.n_neighbors", n_neighbors, minimum=2)
        self.min_dist = checks.number("modes.min_dist", min_dist, minimum=0, maximum=1)
        size = checks.integer("modes.min_cluster_size", min_cluster_size, minimum=2)
        self.min_cluster_size = size
        self.min_samples = checks.integer("modes.min_samples", min_samples, minimum=1)
        self.center = checks.choice("modes.center", center, ["probable", "nearest"])
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)
        if find_spec("umap") is None:
            raise UserError("modes=coda needs the package umap-learn: pip install umap-learn")

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        where = self._reduced(points(latents))  # (N, d)
        labels, probable = self._dense(where, self.min_cluster_size)
        clusters = [np.flatnonzero(labels == k) for k in range(int(labels.max()) + 1)]
        clusters = sorted(clusters, key=len, reverse=True)[:num_modes]
        if len(clusters) < num_modes:
            clusters = self._more(where, clusters, np.flatnonzero(labels < 0), num_modes)
        means = np.stack([where[rows].mean(axis=0) for rows in clusters])  # (K, d)
        apart = np.linalg.norm(where[:, None] - means, axis=2)  # (N, K)
        if self.center == "nearest":
            probable = np.zeros_like(probable)
        chosen = [
            rows[np.lexsort((apart[rows, k], -probable[rows]))[0]]
            for k, rows in enumerate(clusters)
        ]
        owner = apart.argmin(axis=1)
        for k, rows in enumerate(clusters):
            owner[rows] = k  # only points without a cluster go to the nearest
        nearest, assignment = torch.tensor(np.array(chosen)), torch.from_numpy(owner).long()
        return Modes(
            centers=latents[nearest],
            counts=assignment.bincount(minlength=num_modes),
            assignment=assignment,
            nearest=nearest,
        )

    def _reduced(self, rows: np.ndarray) -> np.ndarray:
        """Rows (N, n) standardised and embedded, (N, d)."""
        rows = StandardScaler().fit_transform(rows)
        if len(rows) < _FEWEST or not rows.any():
            return rows
        from umap import UMAP  # seconds to import

        with _UMAP:
            reduced = UMAP(
                n_components=min(self.components, len(rows) - 2),
                n_neighbors=min(self.n_neighbors, len(rows) - 1),
                min_dist=self.min_dist,
                random_state=self.random_state,
                n_jobs=1,
            ).fit_transform(rows)
        return np.asarray(reduced, dtype=np.float64)

    def _dense(self, where: np.ndarray, least: int) -> tuple[np.ndarray, np.ndarray]:
        """HDBSCAN's labels (N,), below 0 for none, and how surely each point has its own."""
        if len(where) < 2 or (where == where[0]).all():
            return np.full(len(where), -1), np.zeros(len(where))
        found = HDBSCAN(
            min_cluster_size=max(2, min(least, len(where))),
            min_samples=min(self.min_samples, len(where)),
            copy=True,
        ).fit(where)
        return np.where(found.labels_ < 0, -1, found.labels_), np.nan_to_num(found.probabilities_)

    def _more(
        self, where: np.ndarray, clusters: list[np.ndarray], loose: np.ndarray, count: int
    ) -> list[np.ndarray]:
        """`count` clusters out of fewer, and of the points that belong to none."""
        clusters = _halved(where, clusters, count, self.min_cluster_size, self._between_peaks)
        fewest = 5 if count <= 10 else 3 if count <= 50 else 1
        missing = min(count - len(clusters), len(loose) // fewest)
        if missing > 0:
            own = _kmeans(missing, where[loose], self.random_state)
            clusters += [loose[own == k] for k in np.unique(own)]
        elif sum(map(len, clusters)) < count:
            clusters.append(loose)
        least = float(self.min_cluster_size)
        while len(clusters) < count:
            least *= _SHRINK
            clusters = _halved(where, clusters, count, least, self._two_means)
        return clusters

    def _between_peaks(self, where: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        """Two parts of a cluster by 2-means from two of its dense parts; one where it has none."""
        labels, _ = self._dense(where[rows], self.min_cluster_size // 2)
        parts = [np.flatnonzero(labels == k) for k in range(int(labels.max()) + 1)]
        peaks = [where[rows[p]].mean(axis=0) for p in sorted(parts, key=len, reverse=True)[:3]]
        tries = [
            KMeans(2, init=np.stack(pair), n_init=1).fit(where[rows])
            for pair in combinations(peaks, 2)
        ]
        if not tries:
            return [rows]
        best = min(tries, key=lambda found: found.inertia_).labels_
        return [rows[best == 0], rows[best == 1]]

    def _two_means(self, where: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
        """Two parts of a cluster by 2-means; identical points by their order."""
        if (where[rows] == where[rows[0]]).all():
            return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        own = _kmeans(2, where[rows], self.random_state)
        return [rows[own == 0], rows[own == 1]]


def _kmeans(count: int, rows: np.ndarray, random_state: int) -> np.ndarray:
    """Labels of the best of ten k-means."""
    count = min(count, len(np.unique(rows, axis=0)))
    return KMeans(count, n_init=10, random_state=random_state).fit(rows).labels_


def _halved(
    where: np.ndarray, clusters: list[np.ndarray], count: int, least: float, halves: Halves
) -> list[np.ndarray]:
    """Up to `count` clusters, the largest halved first; no half is smaller than `least`."""
    left = list(clusters)
    done: list[np.ndarray] = []
    while left and len(left) + len(done) < count:
        rows = left.pop(max(range(len(left)), key=lambda k: len(left[k])))
        parts = halves(where, rows) if len(rows) >= 2 * least and len(rows) > 1 else [rows]
        small = min(map(len, parts)) < max(1, least)
        if len(parts) < 2 or small:
            done.append(rows)
        else:
            left += parts
    return done + left

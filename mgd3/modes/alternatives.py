"""Other mode finders: those of the paper's Table 7, and those of other methods.

Those that may find fewer clusters than K follow one rule: the cluster with the largest inertia is
halved by 2-means until there are K; those that find more keep the K largest and give the other
points to the nearest of them.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.cluster import DBSCAN, BisectingKMeans, KMeans, MiniBatchKMeans, SpectralClustering
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

from mgd3.modes.finders import Modes, distances, modes_at, points
from mgd3.runtime import checks


class MiniBatchKMeansModes:
    """D4M's prototypes: MiniBatchKMeans updated by `expand` K images at a time, in random order.

    Images left over after the last whole batch are not seen, as in the published code (which by a
    slip does see those of the last class).
    """

    def __init__(self, expand: int, random_state: int) -> None:
        self.expand = checks.integer("modes.expand", expand, minimum=1)
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        size = min(len(latents), self.expand * num_modes)
        kmeans = MiniBatchKMeans(num_modes, random_state=self.random_state, batch_size=size)
        draw = torch.Generator().manual_seed(self.random_state)
        order = torch.randperm(len(latents), generator=draw)
        for rows in order[: len(order) // size * size].split(size):
            kmeans.partial_fit(points(latents[rows]))
        centers = torch.from_numpy(kmeans.cluster_centers_).to(latents).view(-1, *latents.shape[1:])
        return modes_at(latents, centers, torch.from_numpy(kmeans.predict(points(latents))).long())


class PooledKMeansModes:
    """K-means on latents averaged to `side` x `side`; a mode is the mean of its members' latents.

    Pooling makes the distance forgive small shifts of an object.
    """

    def __init__(self, side: int, random_state: int) -> None:
        self.side = checks.integer("modes.side", side, minimum=1)
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        side = min(self.side, latents.shape[-1])
        pooled = F.adaptive_avg_pool2d(latents, side)  # (N, C, side, side)
        kmeans = KMeans(num_modes, n_init=1, random_state=self.random_state).fit(points(pooled))
        return _means(latents, kmeans.labels_, num_modes)


class BisectingModes:
    """Divisive k-means: the cluster with the largest inertia is halved until there are K."""

    def __init__(self, random_state: int, n_init: int = 1) -> None:
        """Of `n_init` halvings of a cluster the best is taken."""
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)
        self.n_init = checks.integer("modes.n_init", n_init, minimum=1)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        if num_modes == len(latents):
            return _each_its_own(latents)
        found = BisectingKMeans(num_modes, random_state=self.random_state, n_init=self.n_init).fit(
            points(latents)
        )
        return _means(latents, found.labels_, num_modes)


class GaussianMixtureModes:
    """The component means of a Gaussian mixture with diagonal covariances.

    Full covariances of thousands of dimensions cannot be estimated from one class.
    """

    def __init__(self, reg_covar: float, max_iter: int, random_state: int) -> None:
        self.reg_covar = checks.number("modes.reg_covar", reg_covar, minimum=0)
        self.max_iter = checks.integer("modes.max_iter", max_iter, minimum=1)
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        if num_modes == len(latents):
            return _each_its_own(latents)
        rows = points(latents).astype(np.float64)
        mixture = GaussianMixture(
            num_modes,
            covariance_type="diag",
            reg_covar=self.reg_covar,
            max_iter=self.max_iter,
            random_state=self.random_state,
        ).fit(rows)
        labels = mixture.predict(rows)
        if len(np.unique(labels)) < num_modes:  # a component without images has no mean
            return _means(latents, labels, num_modes)
        centers = torch.from_numpy(mixture.means_).to(latents).view(-1, *latents.shape[1:])
        return modes_at(latents, centers, torch.from_numpy(labels).long())


class SpectralModes:
    """Cluster means of spectral clustering on the graph of nearest neighbours."""

    def __init__(self, n_neighbors: int, random_state: int) -> None:
        self.n_neighbors = checks.integer("modes.n_neighbors", n_neighbors, minimum=1)
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        if num_modes == len(latents):
            return _each_its_own(latents)
        distances = NearestNeighbors().fit(points(latents))
        graph = distances.kneighbors_graph(n_neighbors=min(self.n_neighbors, len(latents) - 1))
        # A little of every other edge connects the graph, which its spectrum presupposes.
        affinity = np.asarray((0.5 * (graph + graph.T)).todense()) + 1e-6
        found = SpectralClustering(
            num_modes, affinity="precomputed", random_state=self.random_state
        ).fit(affinity)
        return _means(latents, found.labels_, num_modes)


class DBSCANModes:
    """Cluster means of DBSCAN; points that it calls noise go to the nearest mean.

    `eps` null tries the distances to the `min_samples`-th neighbour (their 5th to 95th percentile)
    and takes the one whose number of clusters comes closest to K, with the least noise.
    """

    def __init__(self, eps: float | None, min_samples: int) -> None:
        self.eps = None if eps is None else checks.number("modes.eps", eps, minimum=1e-9)
        self.min_samples = checks.integer("modes.min_samples", min_samples, minimum=1)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        rows = points(latents)
        radii = [self.eps] if self.eps else self._radii(rows)
        tries = [DBSCAN(eps=r, min_samples=self.min_samples).fit(rows).labels_ for r in radii]

        def misfit(found: np.ndarray) -> tuple[int, int]:
            return abs(int(found.max()) + 1 - num_modes), int((found < 0).sum())

        return _means(latents, min(tries, key=misfit), num_modes)

    def _radii(self, rows: np.ndarray) -> list[float]:
        neighbors = min(self.min_samples, len(rows))
        distances, _ = NearestNeighbors(n_neighbors=neighbors).fit(rows).kneighbors(rows)
        return [max(float(r), 1e-9) for r in np.percentile(distances[:, -1], range(5, 100, 5))]


class RandomRealModes:
    """K real latents drawn at random without replacement: Table 7's first row."""

    def __init__(self, random_state: int) -> None:
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w)."""
        draw = torch.Generator().manual_seed(self.random_state)
        rows = torch.randperm(len(latents), generator=draw)[:num_modes]
        return modes_at(latents, latents[rows], distances(latents, latents[rows]).argmin(dim=1))


def _each_its_own(latents: Tensor) -> Modes:
    """As many modes as images."""
    return modes_at(latents, latents, torch.arange(len(latents)))


def _means(latents: Tensor, labels: np.ndarray, num_modes: int) -> Modes:
    """Cluster means after the module's rule has made `num_modes` clusters of any labelling.

    Labels below 0 belong to no cluster.
    """
    clusters = [np.flatnonzero(labels == k) for k in range(int(labels.max()) + 1)]
    clusters = [rows for rows in clusters if len(rows)] or [np.arange(len(latents))]
    if len(clusters) > num_modes:
        clusters = sorted(clusters, key=len, reverse=True)[:num_modes]
    centers = torch.stack([latents[rows].mean(dim=0) for rows in clusters])
    owner = distances(latents, centers).argmin(dim=1).numpy()
    for k, rows in enumerate(clusters):
        owner[rows] = k  # only points without a cluster go to the nearest
    clusters = [np.flatnonzero(owner == k) for k in range(len(clusters))]
    while len(clusters) < num_modes:
        widest = max(
            (k for k, rows in enumerate(clusters) if len(rows) > 1),
            key=lambda k: (_inertia(latents[clusters[k]]), len(clusters[k])),
        )
        clusters += _halves(latents, clusters.pop(widest))
    assignment = torch.empty(len(latents), dtype=torch.long)
    for k, rows in enumerate(clusters):
        assignment[rows] = k
    return modes_at(
        latents, torch.stack([latents[rows].mean(dim=0) for rows in clusters]), assignment
    )


def _inertia(latents: Tensor) -> float:
    return (latents - latents.mean(dim=0)).square().sum().item()


def _halves(latents: Tensor, rows: np.ndarray) -> list[np.ndarray]:
    """Two parts of a cluster by 2-means; identical points by their order."""
    inside = points(latents[rows])
    if (inside == inside[0]).all():
        return [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    labels = KMeans(2, n_init=1, random_state=0).fit(inside).labels_
    return [rows[labels == 0], rows[labels == 1]]

"""Mode discovery: representative points of one class's latents (paper section 4.1)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor

from mgd3 import checks
from mgd3.artifacts import load_tensors, save_tensors
from mgd3.types import Modes


class KMeansModes:
    """scikit-learn's KMeans on raw scaled latents; mode k is its k-th cluster centre.

    The released code's settings: k-means++ with one start, random_state 0, Lloyd, no weights and
    no standardisation. Centres keep scikit-learn's order.
    """

    def __init__(
        self, random_state: int = 0, n_init: int = 1, max_iter: int = 300, tol: float = 1e-4
    ) -> None:
        self.random_state = checks.integer("modes.random_state", random_state, minimum=0)
        self.n_init = checks.integer("modes.n_init", n_init, minimum=1)
        self.max_iter = checks.integer("modes.max_iter", max_iter, minimum=1)
        self.tol = checks.number("modes.tol", tol, minimum=0)

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w), N >= num_modes."""
        points = latents.flatten(1)  # (N, C*h*w)
        kmeans = KMeans(
            n_clusters=num_modes,
            random_state=self.random_state,
            n_init=self.n_init,
            max_iter=self.max_iter,
            tol=self.tol,
        )
        with threadpool_limits(1):  # threads would sum in the order in which they finish
            kmeans.fit(points.numpy())
        centers = torch.from_numpy(kmeans.cluster_centers_).to(latents)
        assignment = torch.from_numpy(kmeans.labels_).long()
        return Modes(
            centers=centers.view(num_modes, *latents.shape[1:]),
            counts=assignment.bincount(minlength=num_modes),
            assignment=assignment,
            nearest=torch.cdist(centers, points).argmin(dim=1),
        )


def save_modes(path: Path, modes: Modes, latents: str, nearest_keys: list[str]) -> None:
    """One class's modes as safetensors.

    `latents` identifies what was clustered; `nearest_keys` names the real image next to each mode.
    """
    save_tensors(path, vars(modes), {"latents": latents, "nearest": json.dumps(nearest_keys)})


def load_modes(path: Path, latents: str) -> Modes:
    """Modes of `latents`; `CorruptFileError` if the file is damaged or of other latents."""
    return Modes(**load_tensors(path, {"latents": latents}))

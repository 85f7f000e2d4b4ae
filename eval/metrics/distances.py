"""Distances between images in a feature space, (images, D) by class in label order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgd3.runtime.errors import UserError


def checked(features: Sequence[Tensor], what: str, like: Sequence[Tensor]) -> list[Tensor]:
    """Features as float64; raises `UserError` where they do not go with the real ones, `like`."""
    if len(features) != len(like):
        raise UserError(
            f"{what}: {len(features)} classes, the real ones have {len(like)}; give one tensor per "
            "class, in label order"
        )
    for label, rows in enumerate(features):
        if rows.ndim != 2 or not rows.numel():
            raise UserError(
                f"{what}, class {label}: shape {tuple(rows.shape)} is not (images, features); "
                "every class needs an image"
            )
        if rows.shape[1] != like[0].shape[1]:
            raise UserError(
                f"{what}, class {label}: {rows.shape[1]} numbers per image, the real ones have "
                f"{like[0].shape[1]}; take all from one network"
            )
        if len(bad := (~rows.isfinite()).any(dim=1).nonzero()):
            raise UserError(
                f"{what}, class {label}: image {int(bad[0])} has features that are not finite; "
                "check that image and the network's weights"
            )
    if (total := sum(map(len, features))) < 2:
        raise UserError(f"{what}: {total} samples in total, at least 2 are needed; add images")
    return [rows.detach().double() for rows in features]


def nearest_distances(made: Tensor) -> Tensor:
    """Distance of each of (K, D) to the nearest other, (K,); empty for a single one."""
    if len(made) == 1:
        return made.new_empty(0)
    return _distances(made, made).fill_diagonal_(torch.inf).amin(dim=1)


def distances_to_real(made: Tensor, real: Tensor, neighbors: int) -> Tensor:
    """Mean distance of each of (K, D) to its nearest among (N, D), (K,)."""
    nearest = _distances(made, real).topk(min(neighbors, len(real)), largest=False)
    return nearest.values.mean(dim=1)


def nearer_than(made: Sequence[Tensor], unseen: Sequence[Tensor], real: Sequence[Tensor]) -> float:
    """How often a made image is nearer to a training image of its class than an unseen one is.

    The share of (made, unseen) pairs, ties counted half, mean over classes: 0.5 where made images
    are as far away as photographs that the generator has never seen, towards 1 where it copies
    (the Mann-Whitney statistic of Meehan et al., arXiv 2004.05675).
    """
    shares = []
    for ours, theirs, known in zip(made, unseen, real, strict=True):
        near, far = (_distances(part, known).amin(dim=1) for part in (ours, theirs))
        wins = (near[:, None] < far).double() + 0.5 * (near[:, None] == far).double()
        shares.append(wins.mean().item())
    return sum(shares) / len(shares)


def _distances(some: Tensor, others: Tensor) -> Tensor:
    """Exact to the last bits: by differences, which within a class is fast enough."""
    return torch.cdist(some, others, compute_mode="donot_use_mm_for_euclid_dist")

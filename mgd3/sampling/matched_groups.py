"""Groups of draws whose statistics are close to a Gaussian's (D3HR's group sampling)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

_CHUNK = 1 << 22  # numbers that are drawn at a time
_FLOOR = 1e-12  # of deviations that are divided by


def group_scores(
    groups: Tensor, mean: Tensor, std: Tensor, skew: str, skew_weight: float
) -> Tensor:
    """|mean - mu| + |std - sigma| + skew_weight |skewness| of groups (G, n, D), as (G,).

    Norms are Euclidean, over the dimensions; `mean` and `std` are (D,). `skew` «dimension» is each
    dimension's over the group, as the paper says; «sample» each sample's over its dimensions, as
    the released code computes it, which is next to nothing for Gaussian draws. A group of one has
    no deviation, one of fewer than three no skewness of a dimension.
    """
    count = groups.shape[1]
    own_std = groups.std(dim=1, correction=min(1, count - 1))  # (G, D)
    off = (groups.mean(dim=1) - mean).norm(dim=1) + (own_std - std).norm(dim=1)
    skewness = _skewness(groups, 1 if skew == "dimension" else 2)  # (G, D) or (G, n)
    return off + skew_weight * skewness.norm(dim=1)


def _skewness(groups: Tensor, dim: int) -> Tensor:
    """n / ((n - 1)(n - 2)) sum ((x - mean) / std)^3 along `dim`."""
    n = groups.shape[dim]
    if n < 3:
        return torch.zeros_like(groups.sum(dim=dim))
    centred = groups - groups.mean(dim=dim, keepdim=True)
    deviation = groups.std(dim=dim, keepdim=True).clamp(min=_FLOOR)
    return (centred / deviation).pow(3).sum(dim=dim) * (n / ((n - 1) * (n - 2)))


def search_group(
    mean: Tensor,
    std: Tensor,
    count: int,
    groups: int,
    skew: str,
    skew_weight: float,
    draw: Generator,
) -> Tensor:
    """The group (count, D) of least score among `groups` that are drawn from N(mean, std^2).

    Those of fewer groups are the first ones of more: their best score never rises.
    """
    at_once = max(1, _CHUNK // (count * len(mean)))
    best, least = torch.empty(0), torch.inf
    for start in range(0, groups, at_once):
        # always as many, because the numbers that a generator gives depend on how many are asked
        drawn = mean + std * torch.randn(at_once, count, len(mean), generator=draw)
        scores = group_scores(drawn[: groups - start], mean, std, skew, skew_weight)
        lowest = int(scores.argmin())
        if scores[lowest] < least:
            best, least = drawn[lowest].clone(), scores[lowest].item()
    return best


def exact_group(mean: Tensor, std: Tensor, count: int, draw: Generator) -> Tensor:
    """Draws (count, D), centred and rescaled so that mean and deviation of each dimension agree.

    One draw alone is the mean.
    """
    drawn = torch.randn(count, len(mean), generator=draw)
    centred = drawn - drawn.mean(dim=0)
    own = centred.std(dim=0, correction=min(1, count - 1)).clamp(min=_FLOOR)
    return mean + std * centred / own

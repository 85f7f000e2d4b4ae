"""Memories of latents, and the two losses of Minimax diffusion that look into them.

Gu et al. 2024: latents that the network restores should resemble the least similar real ones
(representativeness) and differ from the most similar of its own (diversity). Li et al. 2025: both
memories keep the least redundant items instead of the newest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd3.runtime import checks

POLICIES = ("fifo", "max_redundancy", "min_redundancy")


class LatentMemory:
    """At most `size` latents of each class, (M, C, h, w), without gradients.

    `policy` says which item goes when there is one too many: the oldest («fifo», Minimax), or the
    one whose cosines with all items have the largest («max_redundancy», Li et al.) or smallest sum.
    """

    def __init__(self, size: int, policy: str) -> None:
        self.size = checks.integer("finetune.memory_size", size, minimum=1)
        self.policy = checks.choice("finetune.memory_policy", policy, POLICIES)
        self.items: dict[int, Tensor] = {}

    def extend(self, label: int, latents: Tensor) -> None:
        """Add latents (B, C, h, w) of one class, then let go what is too many."""
        held = self.items.get(label)
        new = latents.detach().clone()
        held = new if held is None else torch.cat([held, new])
        while len(held) > self.size:
            row = self._victim(held)
            held = torch.cat([held[:row], held[row + 1 :]])
        self.items[label] = held

    def _victim(self, held: Tensor) -> int:
        if self.policy == "fifo":
            return 0
        redundancy = cosines(held, held).sum(dim=1)  # (M,)
        pick = redundancy.argmax() if self.policy == "max_redundancy" else redundancy.argmin()
        return int(pick)

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Its content, for a checkpoint."""
        return {f"{prefix}.{label}": items for label, items in self.items.items()}

    def restore(self, prefix: str, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the content of a checkpoint."""
        self.items = {
            int(key.removeprefix(f"{prefix}.")): items.to(device)
            for key, items in state.items()
            if key.startswith(f"{prefix}.")
        }


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of every pair of flattened latents, (A, B)."""
    return F.normalize(a.flatten(1), dim=1) @ F.normalize(b.flatten(1), dim=1).T


def representativeness_loss(x0_hat: Tensor, labels: Tensor, real: LatentMemory) -> Tensor:
    """mean over the batch's classes of 1 - min cos(x0_hat, real memory); 0 for an empty one."""
    terms = [1 - cosines(x0_hat[labels == c], real.items[c]).min() for c in _known(labels, real)]
    return _mean(terms, labels, x0_hat)


def diversity_loss(x0_hat: Tensor, labels: Tensor, generated: LatentMemory) -> Tensor:
    """mean over the batch's classes of max cos(x0_hat, generated memory); 0 for an empty one."""
    known = _known(labels, generated)
    terms = [cosines(x0_hat[labels == c], generated.items[c]).max() for c in known]
    return _mean(terms, labels, x0_hat)


def _known(labels: Tensor, memory: LatentMemory) -> list[int]:
    return [c for c in labels.unique().tolist() if c in memory.items]


def _mean(terms: list[Tensor], labels: Tensor, like: Tensor) -> Tensor:
    """Over all classes of the batch, also those whose memory is empty."""
    return torch.stack(terms).sum() / len(labels.unique()) if terms else like.new_zeros(())

"""Memories of latents, and the two losses of Minimax diffusion that look into them.

Gu et al. 2024: latents that the network restores should resemble the least similar real ones
(representativeness) and differ from the most similar of its own (diversity). Li et al. 2025: both
memories keep the least redundant items instead of the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

POLICIES = ("fifo", "max_redundancy", "min_redundancy")
UPDATES = ("batch", "epoch")
LOSS_SUMS = ("paper", "released")
_WAITING = "waiting"


class LatentMemory:
    """At most `size` latents of each class, (M, C, h, w), without gradients.

    `policy` says which item goes when there is one too many: the oldest («fifo», Minimax), or the
    one whose cosines with all items have the largest («max_redundancy», Li et al.) or smallest sum.
    `update`: new items come in after each batch (released), or all at the end of an epoch.
    """

    def __init__(self, size: int, policy: str, update: str = "batch") -> None:
        self.size, self.policy, self.update = size, policy, update
        self.items: dict[int, Tensor] = {}
        self._waiting: dict[int, Tensor] = {}  # seen in this epoch

    def extend(self, label: int, latents: Tensor) -> None:
        """Add latents (B, C, h, w) of one class, then let go what is too many."""
        new = latents.detach().clone()
        into = self.items if self.update == "batch" else self._waiting
        held = into.get(label)
        into[label] = new if held is None else torch.cat([held, new])
        if self.update == "batch":
            self.items[label] = self._reduced(self.items[label])

    def end_epoch(self) -> None:
        """Take in what has waited for the end of the epoch."""
        for label, new in self._waiting.items():
            held = self.items.get(label)
            self.items[label] = self._reduced(new if held is None else torch.cat([held, new]))
        self._waiting = {}

    def _reduced(self, held: Tensor) -> Tensor:
        """The items that stay, one by one the most (or least) redundant of the rest let go."""
        if len(held) <= self.size:
            return held
        if self.policy == "fifo":
            return held[-self.size :]
        similar = cosines(held, held)  # (M, M)
        redundancy = similar.sum(dim=1)
        stays = torch.ones(len(held), dtype=torch.bool, device=held.device)
        for _ in range(len(held) - self.size):
            if self.policy == "max_redundancy":
                victim = redundancy.masked_fill(~stays, -torch.inf).argmax(dim=0, keepdim=True)
            else:
                victim = redundancy.masked_fill(~stays, torch.inf).argmin(dim=0, keepdim=True)
            stays = stays.index_fill(0, victim, False)
            redundancy = redundancy - similar.index_select(1, victim)[:, 0]
        # the places that stay, in order: a mask would make the CPU wait for how many they are
        return held[stays.logical_not().byte().argsort(stable=True)[: self.size]]

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Its content, for a checkpoint."""
        found = {f"{prefix}.{label}": items for label, items in self.items.items()}
        waiting = self._waiting.items()
        return found | {f"{prefix}.{_WAITING}.{label}": items for label, items in waiting}

    def restore(self, prefix: str, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take the content of a checkpoint."""
        self.items, self._waiting = {}, {}
        for key, items in state.items():
            owner, *kind, label = key.split(".")
            if owner == prefix:
                into = self._waiting if kind == [_WAITING] else self.items
                into[int(label)] = items.to(device)


def rows_by_class(labels: Tensor) -> dict[int, Tensor]:
    """The rows (n,) of each class of a batch, classes ascending, of labels (B,) on the CPU."""
    return {label: (labels == label).nonzero()[:, 0] for label in labels.unique().tolist()}


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of every pair of flattened latents, (A, B)."""
    return F.normalize(a.flatten(1), dim=1) @ F.normalize(b.flatten(1), dim=1).T


def representativeness_loss(
    x0_hat: Tensor, rows: Mapping[int, Tensor], real: LatentMemory, loss_sum: str = "paper"
) -> Tensor:
    """Of each class of the batch 1 - min cos(x0_hat, real memory), summed as `loss_sum` says."""
    return _summed(lambda own, held: 1 - cosines(own, held).min(), x0_hat, rows, real, loss_sum)


def diversity_loss(
    x0_hat: Tensor, rows: Mapping[int, Tensor], generated: LatentMemory, loss_sum: str = "paper"
) -> Tensor:
    """Of each class of the batch max cos(x0_hat, generated memory), summed as `loss_sum` says."""
    return _summed(lambda own, held: cosines(own, held).max(), x0_hat, rows, generated, loss_sum)


def _summed(
    of_class: Callable[[Tensor, Tensor], Tensor],
    x0_hat: Tensor,
    rows: Mapping[int, Tensor],
    memory: LatentMemory,
    loss_sum: str,
) -> Tensor:
    """sum over the K classes of a batch of w_k times a class's term, 0 for an empty memory.

    «paper»: w_k = 1/K, the mean. «released»: Li et al.'s trainer adds sums that still grow within
    its loop over classes, so the i-th of them (i = 1..K) counts K - i + 1 times: (K - i + 1)/K.
    """
    terms = []
    for place, (label, of_label) in enumerate(rows.items()):
        if label in memory.items:
            times = len(rows) - place if loss_sum == "released" else 1
            term = of_class(x0_hat[of_label], memory.items[label])
            terms.append(term * (times / len(rows)))
    return torch.stack(terms).sum() if terms else x0_hat.new_zeros(())

"""From the CPU to a device: many small tensors in one copy that nobody waits for."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

T = TypeVar("T")
_ALIGNED = 8  # bytes: every dtype's items may begin at a multiple of it


def to_device(tree: T, device: torch.device) -> T:
    """Tensors of the CPU, alone or in (named) tuples, lists and mappings, on `device`.

    All of them together are one copy. To a GPU it goes from pinned memory, so that the CPU goes on
    at once. Whatever else the tree holds stays as it is, and so do tensors on a device.
    """
    if device.type == "cpu":
        return tree
    leaves, shape = tree_flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.device.type == "cpu"]
    ends, size = [], 0
    for i in places:
        size += -size % _ALIGNED + leaves[i].nbytes
        ends.append(size)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for i, end in zip(places, ends, strict=True):
        _part(packed, leaves[i], end).copy_(leaves[i])
    there = packed.to(device, non_blocking=True)
    for i, end in zip(places, ends, strict=True):
        leaves[i] = _part(there, leaves[i], end)
    return tree_unflatten(leaves, shape)


def _part(packed: Tensor, like: Tensor, end: int) -> Tensor:
    """The bytes before `end` as a tensor of the shape and dtype of `like`."""
    return packed[end - like.nbytes : end].view(like.dtype).view(like.shape)

"""Dropout whose masks are the same on every device, compiled or not, whole or shared batches.

PyTorch's own draw from the device's generator, and torch.compile's from yet another. These draw on
the CPU, from its global generator as PyTorch's do there: on a CPU nothing changes. Only masks of
more than `LARGEST` values are drawn by a GPU itself, because a CPU would take seconds for a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mgd3.runtime.compute import to_device

LARGEST = 2**20  # values of a mask: AlexNet's hold 0.6 million, those of GLaD's ViT 26 million

_RANDOM = ("RReLU", "FractionalMaxPool")
_KNOWN = ("torch.nn.modules.", "eval.students.", "torchvision.models.resnet")

_shared: tuple[int, slice] | None = None  # images of the whole batch, and which are seen here


@contextmanager
def part_of_batch(whole: int, mine: slice) -> Iterator[None]:
    """Inside, networks see the images `mine` of a batch of `whole`: so masks are of all of it."""
    global _shared
    before, _shared = _shared, (whole, mine)
    try:
        yield
    finally:
        _shared = before


@contextmanager
def masks_from(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, masks on `device` are those of this seed: they draw from the global generators."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device
        if device.type == "cuda":
            with torch.cuda.device(device):  # which need not be the current one
                torch.cuda.manual_seed(seed)
        yield


@torch.compiler.disable  # compiled code would draw from a generator of its own
def keep_mask(shape: tuple[int, ...], keep: float, like: Tensor, scaled: bool = True) -> Tensor:
    """One with probability `keep`, else 0, over `keep` if `scaled`; dtype and device of `like`."""
    rows, rest = shape[0], shape[1:]
    first, drawn = 0, rows
    if _shared is not None and rows > 1:
        whole, mine = _shared
        each = rows // (mine.stop - mine.start)  # such as the windows of an image
        first, drawn = mine.start * each, whole * each
    shape = (drawn, *rest)
    if like.device.type != "cpu" and math.prod(shape) > LARGEST:
        mask = like.new_empty(shape).bernoulli_(keep)[first : first + rows]
    else:
        mask = torch.empty(shape, dtype=torch.uint8).bernoulli_(keep)[first : first + rows]
        mask = to_device(mask, like.device).to(like.dtype)
    return mask.div_(keep) if scaled and keep > 0 else mask


class Dropout(nn.Dropout):
    """`nn.Dropout` of any number of dimensions; `whole_channels` drops those instead of values."""

    def __init__(self, p: float, whole_channels: bool = False) -> None:
        super().__init__(p)
        self.whole_channels = whole_channels

    def forward(self, x: Tensor) -> Tensor:
        """X (B, ...) of the same shape."""
        if not self.training or self.p == 0:
            return x
        shape = (*x.shape[:2], *(1 for _ in x.shape[2:])) if self.whole_channels else x.shape
        return x * keep_mask(tuple(shape), 1 - self.p, x)


class DropPath(nn.Module):
    """Stochastic depth: a residual branch is left out for some of the images, or for all."""

    def __init__(self, p: float, scaled: bool = True, each: bool = True) -> None:
        super().__init__()
        self.p, self.scaled, self.each = p, scaled, each

    def forward(self, x: Tensor) -> Tensor:
        """X (B, ...) of the same shape."""
        if not self.training or self.p == 0:
            return x
        shape = (x.shape[0] if self.each else 1, *(1 for _ in x.shape[1:]))
        return x * keep_mask(shape, 1 - self.p, x, self.scaled)


_OURS: dict[str, Callable[[Any], nn.Module]] = {  # by what the network's author wrote
    "torch.nn.modules.dropout.Dropout": lambda m: Dropout(m.p),
    "torch.nn.modules.dropout.Dropout1d": lambda m: Dropout(m.p, whole_channels=True),
    "torch.nn.modules.dropout.Dropout2d": lambda m: Dropout(m.p, whole_channels=True),
    "torch.nn.modules.dropout.Dropout3d": lambda m: Dropout(m.p, whole_channels=True),
    "torchvision.ops.stochastic_depth.StochasticDepth": lambda m: DropPath(
        m.p, each=m.mode == "row"
    ),
    "timm.layers.drop.DropPath": lambda m: DropPath(m.drop_prob or 0.0, m.scale_by_keep),
}


def remembers_passes(net: nn.Module) -> bool:
    """Might a pass in train mode change what follows: running statistics, masks that are drawn?

    Only a network of layers that are known, without buffers and random layers, cannot.
    """
    kinds = {type(module) for module in net.modules()}
    drawn = any("drop" in k.__name__.lower() or k.__name__.startswith(_RANDOM) for k in kinds)
    known = all(kind.__module__.startswith(_KNOWN) for kind in kinds)
    return not known or drawn or any(True for _ in net.buffers())


def portable(net: nn.Module) -> nn.Module:
    """The network with these in place of PyTorch's, torchvision's and timm's own."""
    for name, module in list(net.named_modules(remove_duplicate=False)):
        kind = type(module)
        if name and (make := _OURS.get(f"{kind.__module__}.{kind.__qualname__}")):
            net.set_submodule(name, make(module))
    return net

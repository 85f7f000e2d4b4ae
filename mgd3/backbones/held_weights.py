"""Weights held in the type that autocast would cast them to in every forward pass."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

Network = TypeVar("Network", bound=nn.Module)


class HeldWeights(Generic[Network]):
    """A network, or its twin whose linear and convolutional layers hold weights of `dtype`.

    Autocast casts just those weights; held so, they are cast once, and results are the same bit for
    bit. All other tensors are the network's own. The twin follows its weights: whatever is copied
    into them (fine-tuned ones) is cast before the next use.
    """

    def __init__(self, network: Network, dtype: torch.dtype | None) -> None:
        """`dtype` None: the network itself."""
        self._network, self._dtype = network, dtype
        self._twin: Network | None = None
        self._pairs: list[tuple[Tensor, Tensor]] = []  # weights, and what the twin holds of them
        self._versions: list[int] = []

    @property
    def current(self) -> Network:
        """The network to run, always the same object; its weights are up to date."""
        if self._dtype is None:
            return self._network
        versions = [_version(weight) for weight, _ in self._pairs]
        with torch.inference_mode(False), torch.no_grad():
            if self._twin is None:
                self._twin = self._made(self._dtype)
                self._versions = [_version(weight) for weight, _ in self._pairs]
            elif versions != self._versions:
                for (weight, held), now, before in zip(
                    self._pairs, versions, self._versions, strict=True
                ):
                    if now != before:
                        held.copy_(weight)
                self._versions = versions
        return self._twin

    def _made(self, dtype: torch.dtype) -> Network:
        """A copy of the modules whose memory holds every tensor that is not to be copied."""
        shared = [*self._network.parameters(), *self._network.buffers()]
        memo: dict[int, object] = {id(tensor): tensor for tensor in shared}
        for weight in _cast_by_autocast(self._network):
            held = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
            self._pairs.append((weight, held))
            memo[id(weight)] = held
        return copy.deepcopy(self._network, memo)


def _cast_by_autocast(network: nn.Module) -> list[nn.Parameter]:
    """Weights that nothing but linear layers and convolutions uses."""
    cast: dict[int, nn.Parameter] = {}
    used_otherwise: set[int] = set()
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            if isinstance(module, nn.Linear | _ConvNd) and parameter.dtype == torch.float32:
                cast[id(parameter)] = parameter
            else:
                used_otherwise.add(id(parameter))
    return [parameter for key, parameter in cast.items() if key not in used_otherwise]


def _version(weight: Tensor) -> int:
    """Counts what was written into it; a tensor made for inference alone is never written."""
    return 0 if weight.is_inference() else weight._version

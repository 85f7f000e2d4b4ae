"""Which weights generate which classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.runtime.compute import Work
from mgd3.runtime.stages import Stage
from mgd3.storage.tensors import load_tensors

if TYPE_CHECKING:  # diffusers takes seconds to import, and not every run needs it
    from mgd3.backbones.dit import DiT


@dataclass(frozen=True)
class Phase:
    """Some classes and the weights that generate them; None are the backbone's own."""

    classes: Sequence[ClassInfo]
    weights: Path | None

    @contextmanager
    def applied(self, backbone: Backbone) -> Iterator[None]:
        """The backbone has these weights inside this block."""
        if self.weights is None:
            yield
            return
        network = cast("DiT", backbone).bare.network
        tensors = load_tensors(self.weights)
        own = {k: v for k, v in network.state_dict().items() if k in tensors}
        before = {k: v.clone() for k, v in own.items()}
        overwrite(network, tensors)
        try:
            yield
        finally:
            overwrite(network, before)


class NoFineTuning:
    """The backbone as it is."""

    def __call__(self, backbone: Backbone, dataset: RealDataset, work: Work) -> list[Phase]:
        """All classes at once."""
        return [Phase(dataset.classes, None)]

    def stages(
        self,
        backbone: Backbone,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        work: Work,
    ) -> list[Stage]:
        """Nothing."""
        return []


@torch.no_grad()
def overwrite(network: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a network's own, by name."""
    own = network.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)

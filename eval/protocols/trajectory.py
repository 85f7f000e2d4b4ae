"""A student's states on its way through the full real set: untrained, and after each epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from eval.protocols.teachers import FullSetNetwork, class_key
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.storage.cache import TENSORS, found
from mgd3.storage.files import waiting

log = logging.getLogger(__name__)

States = Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class StudentTrajectory:
    """One file per epoch in the cache; a stopped training goes on and gives the same files."""

    network: FullSetNetwork

    def has(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> bool:
        """Is every state there?"""
        path, key = self._files(dataset, inventory)
        return self._complete(path, key)

    def states(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> States:
        """Reads the state dict after so many epochs, 0 to all; trained now unless all are there."""
        path, key = self._files(dataset, inventory)
        if not self._complete(path, key):
            folder = path(0).parent
            with waiting(folder.parent, folder.name):
                # twice where a state is gone that a checkpoint goes on from
                while not self._complete(path, key):
                    self._train(path, key, dataset, inventory)
        return lambda epoch: TENSORS.read(path(epoch), key)

    def _files(
        self, dataset: RealDataset, inventory: Sequence[ClassImages]
    ) -> tuple[Callable[[int], Path], dict[str, str]]:
        """Where the state after an epoch lies, and what all are made from."""
        classes = class_key(dataset)
        network, made_from = self.network.file(classes, inventory)
        folder = self.network.place.cache / "trajectories" / network.stem
        key = {"classes": classes, "made_from": made_from}
        return lambda epoch: folder / f"{epoch:04d}.safetensors", key

    def _complete(self, path: Callable[[int], Path], key: dict[str, str]) -> bool:
        epochs = range(self.network.options.epochs + 1)
        return all(found(path(epoch), key) is not None for epoch in epochs)

    def _train(
        self,
        path: Callable[[int], Path],
        key: dict[str, str],
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
    ) -> None:
        net = self.network.fresh(dataset)
        checkpoint = path(0).with_name("training.part")

        def keep(epoch: int) -> None:
            TENSORS.write(path(epoch), net.state_dict(), key)

        keep(0)
        self.network.train(net, checkpoint, dataset, inventory, keep)
        checkpoint.unlink(missing_ok=True)
        log.info("%s on its way: %s", self.network.options.student, checkpoint.parent)

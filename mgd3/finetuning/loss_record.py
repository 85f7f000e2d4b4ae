"""The losses of a training, looked at now and then: on a GPU looking is waiting."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mgd3.runtime.errors import UserError

_READ_EVERY = 25  # steps on a GPU; on a CPU every one is looked at before it is learned from


class Losses:
    """One loss of every step; the first that is not finite is an error when it is looked at."""

    def __init__(self, diverged: Callable[[int, float], UserError]) -> None:
        """`diverged` is what a step and its loss are refused with."""
        self._diverged = diverged
        self._read: list[float] = []
        self._waiting: list[Tensor] = []  # on the device

    def add(self, loss: Tensor) -> None:
        """One more step's; `UserError` if one that is looked at now is not finite."""
        due = len(self) % _READ_EVERY == 0
        self._waiting.append(loss.detach())
        if loss.device.type == "cpu" or due:
            self.all()

    def all(self) -> list[float]:
        """Of every step; `UserError` if one is not finite."""
        if self._waiting:
            found, self._waiting = torch.stack(self._waiting).tolist(), []
            for loss in found:
                if not math.isfinite(loss):
                    raise self._diverged(len(self._read), loss)
                self._read.append(loss)
        return self._read

    def recent(self, count: int) -> float:
        """Mean of the last `count` that have been looked at; 0 before the first."""
        found = self._read[-count:]
        return sum(found) / max(1, len(found))

    def restore(self, losses: list[float]) -> None:
        """Go on after these."""
        self._read, self._waiting = losses, []

    def __len__(self) -> int:
        return len(self._read) + len(self._waiting)

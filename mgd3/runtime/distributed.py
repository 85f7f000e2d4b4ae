"""Several processes on one run, started by torchrun; one process is the ordinary case."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed, nn

from mgd3.runtime.errors import UserError
from mgd3.runtime.screen import hide_progress

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # the others wait while the first process distils


@dataclass(frozen=True)
class Ranks:
    """Which of `world` processes this is. The first one alone writes files."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Is this the process that writes?"""
        return self.rank == 0

    def share(self, count: int) -> tuple[slice, float]:
        """This process's rows of `count`, and their part of the whole.

        A process for which no row is left takes the first one for nothing, so that all take part
        in every sum.
        """
        start, stop = (count * r // self.world for r in (self.rank, self.rank + 1))
        return (slice(start, stop), (stop - start) / count) if stop > start else (slice(0, 1), 0.0)

    def sum(self, value: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            distributed.all_reduce(value)
        return value

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Each gradient becomes its sum over processes: one message for all."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = self.sum(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def in_turn(self, work: Callable[[], T]) -> T:
        """`work()` of the first process, then of the others, which find what it has written."""
        if self.first:
            result = work()
            self.wait()
            return result
        self.wait()
        return work()

    def named(self, name: str) -> str:
        """A name for what each process has of its own; the first one's is the name itself."""
        return name if self.first else f"{name}-rank{self.rank}"

    def mine(self, item: int) -> bool:
        """Is work item number `item` this process's, where they take turns?"""
        return item % self.world == self.rank

    def least_and_most(self, number: int, device: torch.device) -> tuple[int, int]:
        """The smallest and the largest of what the processes give."""
        if self.world == 1:
            return number, number
        bounds = torch.tensor([-number, number], dtype=torch.int64, device=device)
        distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX)
        least, most = bounds.tolist()
        return -least, most

    def agreed(self, number: int, device: torch.device) -> int:
        """The first process's number."""
        return self.agreed_list([number], device)[0]

    def agreed_list(self, numbers: Sequence[int], device: torch.device) -> list[int]:
        """The first process's numbers, as many as every process gives."""
        mine = [int(n) if self.first else 0 for n in numbers]
        return self.sum(torch.tensor(mine, dtype=torch.int64, device=device)).tolist()

    def any(self, mine: bool, device: torch.device) -> bool:
        """Does it hold for any process?"""
        return mine if self.world == 1 else bool(self.sum(torch.tensor(int(mine), device=device)))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


def join(device: torch.device) -> tuple[Ranks, torch.device]:
    """This process's place among those that torchrun started, and the GPU that is its own.

    Raises `UserError` for more processes than GPUs.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Ranks(), device
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"torchrun started process {local} here, but there are "
                f"{torch.cuda.device_count()} GPUs; lower --nproc-per-node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if not distributed.is_initialized():
        distributed.init_process_group(backend, timeout=_PATIENCE)
    if rank:
        hide_progress()
        logging.disable(logging.INFO)
    return Ranks(rank, world), device

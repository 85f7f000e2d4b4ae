"""How many images at once: as asked, or as free memory takes, and fewer when it runs out."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mgd3.types import UserError

log = logging.getLogger(__name__)

LARGEST_BATCH = 128  # beyond it no network here gets faster
_SHARE = 0.7  # of the free memory: the allocator's gaps and the libraries' workspaces need some


class _LiveBytes(TorchDispatchMode):
    """Adds up the memory of the tensors that live at the same time, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def peak_bytes(function: Callable[[], object]) -> int:
    """The most memory that tensors made by `function` take at one time."""
    with _LiveBytes() as mode:
        function()
    return mode.peak


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def largest_batch(work: Callable[[int], object], device: torch.device) -> int:
    """The batch that free memory takes, from what `work(1)` and `work(2)` need; a power of two."""
    work(1)  # loads weights and fills caches, which are not to be counted
    one, two = (peak_bytes(lambda n=n: work(n)) for n in (1, 2))  # type: ignore[misc]
    per_image = max(1, two - one)
    room = _SHARE * free_bytes(device) - max(0, one - per_image)
    fits = max(1, min(LARGEST_BATCH, int(room / per_image)))
    size = 1 << (fits.bit_length() - 1)
    log.info("batch_size=auto: %d at once, %.2f GiB each", size, per_image / 2**30)
    return size


def ran_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on the GPU or the CPU?"""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def smaller(size: int, error: RuntimeError | MemoryError, what: str) -> int:
    """Half of `size` after an allocation failed; raises any other error again."""
    if not ran_out_of_memory(error):
        raise error
    if size == 1:
        raise UserError(
            f"out of memory while {what} a single image; try vae_slicing=true, precision=bfloat16 "
            "or a smaller backbone.image_size, or free memory that other processes hold"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    log.warning("out of memory while %s %d images at once; going on with %d", what, size, size // 2)
    return size // 2


def in_parts(function: Callable[[Tensor], Tensor], rows: Tensor, size: int, what: str) -> Tensor:
    """`function` of `rows`, at most `size` at a time, fewer if memory runs out."""
    done: list[Tensor] = []
    start = 0
    while start < len(rows):
        try:
            done.append(function(rows[start : start + size]))
        except (RuntimeError, MemoryError) as error:
            size = smaller(min(size, len(rows) - start), error, what)
            continue
        start += size
    return torch.cat(done)

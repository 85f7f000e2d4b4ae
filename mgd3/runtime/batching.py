"""How many images at once: as asked, or as free memory takes, and fewer when it runs out."""

from __future__ import annotations

import logging
import sys
import traceback
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mgd3.runtime.errors import UserError
from mgd3.runtime.hardware import full_gpu

log = logging.getLogger(__name__)


class Sliceable(Protocol):
    """A list or a tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> Any: ...


S = TypeVar("S", bound=Sliceable)

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
    """Memory that this process may still take: of the GPU, or of the machine and its limits."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(psutil.virtual_memory().available, *_limits())


def _limits() -> list[int]:
    """What a container or a batch system leaves this process (Linux's control groups, v2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / f"memory.{n}").read_text().strip() for n in ("max", "current"))
    except OSError:
        return [sys.maxsize]
    return [sys.maxsize if limit == "max" else max(0, int(limit) - int(used))]


def memory_words() -> str:
    """How full the GPU is, and what can be done, after a colon; nothing where there is none."""
    if not torch.cuda.is_available():
        return ""
    try:
        free, total = torch.cuda.mem_get_info()
    except RuntimeError:  # too full for the few hundred megabytes that any use of it takes
        return (
            ": the GPU is full (nvidia-smi says by whom); take another with compute.device=cuda:N"
        )
    name = f"cuda:{torch.cuda.current_device()}"
    return f": {full_gpu(name, free, total, torch.cuda.memory_reserved())}"


def largest_batch(
    work: Callable[[int], object], device: torch.device, doing: str = "sampling"
) -> int:
    """The batch that free memory takes, from what `work(1)` and `work(2)` need; a power of two.

    Raises `UserError` if there is no memory for one.
    """
    if not _fits(work, 1):  # it also loads weights and fills caches, which are not to be counted
        raise _too_large(doing)
    if not _fits(work, 2):
        return 1
    one, two = (peak_bytes(partial(work, n)) for n in (1, 2))
    per_image = max(1, two - one)
    room = _SHARE * free_bytes(device) - max(0, one - per_image)
    fits = max(1, min(LARGEST_BATCH, int(room / per_image)))
    size = 1 << (fits.bit_length() - 1)
    log.info("%s %d images at once, %s MiB each", doing, size, f"{-(-per_image // 2**20):,}")
    return size


def _fits(work: Callable[[int], object], size: int) -> bool:
    try:
        work(size)
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        return False
    return True


def ran_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail, on the GPU (its libraries have words of their own) or the CPU?"""
    words = ("can't allocate memory", "ALLOC_FAILED", "out of memory", "unable to find an engine")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


class Batches:
    """A batch size that shrinks when memory runs out, and stays so."""

    def __init__(self, size: int, doing: str) -> None:
        """`doing` names the work in messages, such as «decoding»."""
        self.size = size
        self._doing = doing

    def attempts(self, items: S) -> Iterator[Attempt[S]]:
        """All items, part by part; a part whose block ran out of memory comes again, halved.

        Use each attempt in a `with` block. Raises `UserError` if one item does not fit.
        """
        start = 0
        while start < len(items):
            attempt = Attempt(items[start : start + self.size])
            yield attempt
            if attempt.error is None:
                start += len(attempt.part)
            else:
                self._shrink(len(attempt.part), attempt.error)

    def _shrink(self, rows: int, error: BaseException) -> None:
        if rows == 1:
            raise _too_large(self._doing) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = rows // 2
        message = "out of memory while %s %d images at once; going on with %d"
        log.warning(message, self._doing, rows, self.size)


class Attempt(Generic[S]):
    """A part of a batch that may turn out too large for the memory."""

    def __init__(self, part: S) -> None:
        self.part = part
        self.error: BaseException | None = None

    def __enter__(self) -> S:
        return self.part

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> bool:
        """Swallow a failed allocation; any other error is not its business."""
        if error is None or not ran_out_of_memory(error):
            return False
        traceback.clear_frames(trace)  # with it goes the failed attempt's memory
        self.error = error.with_traceback(None)
        return True


def _too_large(doing: str) -> UserError:
    return UserError(
        f"out of memory while {doing} a single image; try compute.vae_slicing=true, "
        "compute.precision=bfloat16 or a smaller backbone.image_size, or free memory that other "
        f"processes hold{memory_words()}"
    )

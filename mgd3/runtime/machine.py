"""What did the work: machine and commit that stand beside numbers; memory that is kept."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import psutil
import torch
from threadpoolctl import threadpool_limits

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST = 2**31 - 1
_limited: list[int] = []  # threads before `make_deterministic` left one


def machine_name(device: torch.device, processes: int = 1) -> str:
    """The GPU, or the processor and how many of its cores one of the processes may use."""
    name = _name(device)
    return f"{processes} x {name}" if processes > 1 else name


@cache
def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    process = psutil.Process()
    cores = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    return f"{cores} cores of {model}"


@cache
def library_versions() -> str:
    """Of Python and of the libraries that a score depends on."""
    libraries = [f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "numpy")]
    return ", ".join([f"python {platform.python_version()}", *libraries])


class Checkout:
    """The project's git commit, as it was when this process first asked.

    By then the code is loaded: what is committed, pulled or edited while a process runs is not
    what made its numbers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first: str | None = None
        self._seen: str | None = None

    @property
    def commit(self) -> str:
        """With «-dirty» if files differ from it; «unknown» without git."""
        if self._first is None:
            self._first = self._seen = self._now()
        return self._first

    def moved(self) -> str | None:
        """The commit that is there now, if it is another one than when this was last asked."""
        before, self._seen = self._seen, self._now()
        self._first = self._first or self._seen
        return self._seen if before not in (None, self._seen) else None

    def _now(self) -> str:
        words = "git", "-C", str(self._folder), "status", "--porcelain=v2", "--branch"
        try:
            done = subprocess.run(
                [*words, "--untracked-files=no"], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return "unknown"
        head, *rest = done.stdout.splitlines()  # # branch.oid COMMIT; then files without a #
        dirty = any(not line.startswith("#") for line in rest)
        return head.split()[-1][:12] + ("-dirty" if dirty else "")


CHECKOUT = Checkout(Path(__file__).parent)


def commit() -> str:
    """What stands beside a number: this process's commit."""
    return CHECKOUT.commit


def make_deterministic(wanted: bool) -> None:
    """Sums in one order: one thread, and no operation whose result depends on timing.

    With `wanted`, an operation that has no such form raises, naming itself.
    """
    if wanted != torch.are_deterministic_algorithms_enabled():  # it takes a second of imports
        torch.use_deterministic_algorithms(wanted)
    if _limited:  # by an earlier run of this process
        torch.set_num_threads(_limited.pop())
    if wanted:
        _limited.append(torch.get_num_threads())
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.backends.cudnn.benchmark = False
        torch.set_num_threads(1)
        threadpool_limits(1)  # scikit-learn's and SciPy's, for the rest of this process


def keep_freed_memory() -> None:
    """Let glibc reuse large blocks instead of unmapping them; elsewhere this does nothing.

    A training step on the CPU allocates and frees the same few hundred megabytes again and again;
    by default each block is mapped anew, and the kernel zeroes it page by page
    (scripts/benchmark.py measures what that costs). Results do not change.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    mallopt(_M_TRIM_THRESHOLD, _LARGEST)

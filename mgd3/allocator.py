"""Keeping freed memory in the process, where the C library would give every block back."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST = 2**31 - 1


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

"""GPUs and cores of this machine, as far as they can be told without loading torch."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import sys
from pathlib import Path

from mgd3.runtime.errors import UserError


def refuse_missing_gpu(device: object) -> None:
    """`UserError` for `compute.device=cuda` where there is certainly none."""
    reason = why_no_gpu() if str(device).split(":")[0] == "cuda" else None
    if reason:
        raise unavailable(device, reason)


def unavailable(device: object, reason: str) -> UserError:
    """That a device is not here, with what can be done."""
    return UserError(
        f"compute.device={device} is not available here: {reason}. Allowed: auto (a GPU if there "
        "is one), cpu, cuda, or cuda:N of several; compute=gpu_fast asks for cuda, compute=auto "
        "takes what there is"
    )


def usable_cores() -> int:
    """Cores that this process may use; those that torchrun starts side by side share them."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        cores = os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def full_gpu(name: str, free: int, total: int, own: int) -> str:
    """Who holds a GPU's memory, and what can be done; `own` is this process's part, in bytes."""
    gib = 2**30
    others = max(0, total - free - own)
    held = f"{name} has {free / gib:.1f} of {total / gib:.1f} GiB free"
    if others < 0.1 * total:
        return f"{held}, and this process holds {own / gib:.1f}"
    return (
        f"{held}: other processes hold {others / gib:.1f} (nvidia-smi lists them). Wait for them, "
        "end them, or take another GPU with compute.device=cuda:N"
    )


def why_no_gpu() -> str | None:
    """What is missing: the build of PyTorch, a visible device, or the driver; None: nothing."""
    versions = _versions()
    if not (versions.get("cuda") or versions.get("hip")):
        name = versions.get("__version__") or "PyTorch"
        return (
            f"this build of PyTorch ({name}) is for CPUs alone; install one for CUDA, as "
            "pytorch.org/get-started says"
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.split(",")[0].strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU; unset it, or name one in it"
    if not versions.get("hip") and not _has_driver():
        return "this machine has no NVIDIA driver (nvidia-smi would say the same)"
    return None


def _versions() -> dict[str, str | None]:
    """What torch/version.py says: `__version__`, `cuda`, `hip`; loading torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    text = Path(str(spec and spec.origin)).with_name("version.py").read_text()
    pairs = re.findall(r"^(\w+)(?:\s*:[^=\n]*)?\s*=\s*(?:'([^']*)'|None)", text, re.M)
    return {name: value or None for name, value in pairs}


def _has_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True

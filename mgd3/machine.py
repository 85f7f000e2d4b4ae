"""What did the work: the name that stands beside a time, an accuracy, a plan."""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path

import psutil
import torch


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

"""How threads that wait should wait: a small student alone, and beside a process that takes a core.

OpenMP reads the environment when torch is loaded, so each way is a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from mgd3.config.schema import ROOT
from scripts.timings.stopwatch import Report

_CORES = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
_WAYS: Mapping[str, Mapping[str, str]] = {
    "a thread each core, as OpenMP waits by itself": {"OMP_NUM_THREADS": _CORES},
    "OMP_WAIT_POLICY=passive": {"OMP_NUM_THREADS": _CORES, "OMP_WAIT_POLICY": "passive"},
    "GOMP_SPINCOUNT=1000, the scripts'": {"OMP_NUM_THREADS": _CORES, "GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
_ASKED = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_IMAGES, _SIDE, _TESTS = 10, 16, 719  # the demo's


def main() -> None:
    """A table of seconds per training."""
    report = Report("a ConvNet-3 on ten images of 16 px, 300 epochs", "alone", "beside a busy core")
    for name, environment in _WAYS.items():
        alone = _seconds(environment)
        with _busy_core():
            beside = _seconds(environment)
        report.add(name, f"{alone:.2f}", f"{beside:.2f}")
    report.show()


def _seconds(environment: Mapping[str, str]) -> float:
    """Of the second training in a process with this environment; the first warms up."""
    base = {k: v for k, v in os.environ.items() if k not in _ASKED}
    done = subprocess.run(
        [sys.executable, "-m", "scripts.timings.threads"],
        env=base | {"PYTHONPATH": str(ROOT)} | dict(environment),
        check=True,
        capture_output=True,
        text=True,
    )
    return float(json.loads(done.stdout)[-1])


@contextmanager
def _busy_core() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _trainings() -> list[float]:
    """Seconds of two trainings, in this process."""
    import torch

    from eval.protocols.training import StudentTraining
    from eval.students.registry import make_student
    from mgd3.config.build import build_protocol
    from mgd3.config.identity import register
    from mgd3.config.schema import composed
    from mgd3.runtime.machine import keep_freed_memory

    register()
    keep_freed_memory()
    protocol = build_protocol(composed("experiment=demo"))
    shapes = (_IMAGES, 3, _SIDE, _SIDE), (_TESTS, 3, _SIDE, _SIDE)
    pixels, test = (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes)
    labels, seconds = torch.arange(_IMAGES) % 2, []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            training = StudentTraining(
                make_student("convnet3_w64", 2, _SIDE, 0),
                protocol.recipe(_IMAGES // 2, 2, "convnet3_w64"),
                protocol.objective(pixels, None),
                0,
                Path(folder, "checkpoint"),
            )
            start = time.perf_counter()
            training.fit(pixels, labels, (test, torch.arange(_TESTS) % 2), lambda history: None)
            seconds.append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    print(json.dumps(_trainings()))

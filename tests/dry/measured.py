"""Subjects on the CPU and on the dry device, each in a process of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support import composed
from torch.nn.attention import SDPBackend, sdpa_kernel

from dry.count import Counts, counting
from dry.generating import weights
from dry.subjects import Subject
from dry.work import Values


@dataclass
class Figures:
    """A subject: how far its values are from the CPU's, and what a step costs."""

    name: str
    step: str
    pixels: int
    difference: float = 0.0  # the largest, from the CPU's values
    refused: str = ""  # why it did not run
    waits: Counter = field(default_factory=Counter)  # of a step, by (what, line)
    copies: Counter = field(default_factory=Counter)  # of a step, by (direction, line)
    to_device: Counter = field(default_factory=Counter)  # bytes of a step, by line
    to_host: Counter = field(default_factory=Counter)
    expanded: Counter = field(default_factory=Counter)  # bytes of the whole run, by line
    seconds: float = 0.0  # of the processor


def measured(subjects: list[Subject], processes: int = 2) -> Iterator[Figures]:
    """The figures of each subject, group by group.

    Processes are forks of this one, that has imported everything and computed nothing.
    """
    for module in ("sklearn.cluster", "sklearn.datasets", "matplotlib.pyplot", "timm"):
        importlib.import_module(module)
    for protocol in ("hard_label", "soft_label", "soft_label_fkd"):  # read once for all of them
        composed("dataset=digits", f"protocol={protocol}", "finetune=plain")
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.process, []).append(subject)
    with tempfile.TemporaryDirectory() as folder:
        weights(Path(folder))
        _TASKS[:] = [(group, Path(folder)) for group in groups.values()]
        with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
            for number, found in enumerate(pool.imap(_group, range(len(_TASKS)), chunksize=1)):
                for subject, figures in zip(_TASKS[number][0], found, strict=True):
                    yield Figures(subject.name, subject.step, subject.pixels, **figures)


_TASKS: list[tuple[list[Subject], Path]] = []  # what a fork finds; functions cannot be sent to it


def _group(number: int) -> list[dict[str, Any]]:
    """The figures of subjects that share a process, without the subjects."""
    # it is this process's device from now on, and autograd looks for devices once
    importlib.import_module("dry.device")
    subjects, folder = _TASKS[number]
    return [_figures(subject, folder) for subject in subjects]


def _figures(subject: Subject, folder: Path) -> dict[str, Any]:
    start = time.process_time()
    try:
        found = _compared(subject, folder)
    except Exception:
        found = {"refused": traceback.format_exc()}
    return found | {"seconds": time.process_time() - start}


def _compared(subject: Subject, folder: Path) -> dict[str, Any]:
    from dry.device import NAME, TO_DEVICE, TO_HOST

    with sdpa_kernel(SDPBackend.MATH):  # attention as devices without a kernel for it compute it
        expected, _ = _run(subject, "cpu", subject.amount, folder)
    values, seen = _run(subject, NAME, subject.amount, folder)
    assert values.keys() == expected.keys()
    each, expanded = _of_a_step(subject, seen, folder)
    return {
        "difference": max(_distance(values[k], v) for k, v in expected.items()),
        "waits": each(lambda c: c.waits),
        "copies": each(lambda c: c.copies),
        "to_device": each(lambda c: c.bytes_by_line(TO_DEVICE)),
        "to_host": each(lambda c: c.bytes_by_line(TO_HOST)),
        "expanded": expanded,
    }


def _of_a_step(subject: Subject, seen: Counts, folder: Path):
    """What a step costs, as a function of what is counted; and all expanded copies.

    Where a subject marks its steps, it is the second one. Where it does not, two further runs tell,
    one of twice as many steps: caches were filled by the first.
    """
    if seen.marks:
        few, many, steps, expanded = seen.marks[1], seen.marks[2], 1, seen.expanded
    else:
        from dry.device import NAME

        steps = subject.amount
        few, many = (_run(subject, NAME, n, folder)[1] for n in (steps, 2 * steps))
        expanded = many.expanded

    def each(of: Callable[[Counts], Counter]) -> Counter:
        difference = Counter(of(many))
        difference.subtract(of(few))
        return Counter({key: n / steps for key, n in difference.items() if n})

    return each, expanded


def _run(subject: Subject, device: str, amount: int, folder: Path) -> tuple[Values, Counts]:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        work = subject.make(device, amount, Path(own))
        with counting() as counts:
            values = work()
        return {name: value.cpu().double() for name, value in values.items()}, counts


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float("inf") if a.shape != b.shape else (a - b).abs().max().item()

"""Measurements in processes of their own, so that peak memory is their own too."""

from __future__ import annotations

import math
import multiprocessing
import platform
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mgd3.runtime.machine import commit

Job = tuple[Any, ...]  # a function of this package, and its arguments


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronise(device: torch.device) -> None:
    """Wait for what the GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def apart(function: Callable[..., Any], *arguments: object) -> tuple[Any, float]:
    """(result, peak MiB) of a measurement in a process of its own; (None, nan) if it failed."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        print(f"{function.__name__}{arguments} failed; its error is above", file=sys.stderr)
        return None, math.nan
    finally:
        process.join()


def _measure(connection: Any, function: Callable[..., Any], arguments: tuple) -> None:
    result = function(*arguments)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    connection.send((result, memory))


class Report:
    """A table whose rows are also printed as they come, so that a broken run has them."""

    def __init__(self, *columns: str) -> None:
        on_gpu = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
        machine = f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
        self._table = Table(title=f"{machine}, {commit()}")
        self._columns = columns
        for column in columns:
            self._table.add_column(column, justify="left" if column == columns[0] else "right")

    def add(self, *cells: str) -> None:
        """One row; missing cells stay empty."""
        filled = zip(self._columns[1:], cells[1:], strict=False)
        print(f"{cells[0]}: {', '.join(f'{c} {v}' for c, v in filled)}", file=sys.stderr)
        self._table.add_row(*cells)

    def compare(self, jobs: list[tuple[str, Job]], slower: bool = False) -> None:
        """Rows of seconds, how many times as fast as the first job, and peak memory.

        With `slower`, how many times as slow.
        """
        reference = None
        for label, (function, *arguments) in jobs:
            seconds, memory = apart(function, *arguments)
            if seconds is None:
                self.add(label, "failed")
                continue
            reference = reference or seconds
            ratio = seconds / reference if slower else reference / seconds
            self.add(label, f"{seconds:.4f}", f"{ratio:.2f}", f"{memory:.0f}")
        self._table.add_section()

    def section(self) -> None:
        """A line below the last row."""
        self._table.add_section()

    def show(self) -> None:
        """Print it, wide enough for a file."""
        Console(width=120).print(self._table)

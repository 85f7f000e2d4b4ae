"""Measurements in processes of their own, so that peak memory is their own too."""

from __future__ import annotations

import multiprocessing
import platform
import resource
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mgd3.distilled import commit

Job = tuple[Any, ...]  # a function of this package, and its arguments


def default_device() -> str:
    """The GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronise(device: torch.device) -> None:
    """Wait for what the GPU still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def apart(function: Callable[..., Any], *arguments: object) -> tuple[Any, float]:
    """(result, peak MiB) of a measurement in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"{function.__name__}{arguments} failed; its error is above") from None
    finally:
        process.join()


def _measure(connection: Any, function: Callable[..., Any], arguments: tuple) -> None:
    result = function(*arguments)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB on Linux
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**20
    connection.send((result, memory))


def new_table(*columns: str) -> Table:
    """An empty table that says which machine, versions and commit it is of."""
    on_gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else platform.processor() or "CPU"
    table = Table(
        title=f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {commit()}"
    )
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def compare(table: Table, jobs: list[tuple[str, Job]]) -> None:
    """Rows of seconds, the ratio to the first job, and peak memory."""
    reference = None
    for label, (function, *arguments) in jobs:
        seconds, memory = apart(function, *arguments)
        reference = reference or seconds
        table.add_row(label, f"{seconds:.4f}", f"{reference / seconds:.2f}", f"{memory:.0f}")
    table.add_section()


def show(table: Table) -> None:
    """Print it, wide enough for a file."""
    Console(width=120).print(table)

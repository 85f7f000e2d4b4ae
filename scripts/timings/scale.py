"""Runs of 10, 100 and 1,000 classes, end to end with a toy backbone: is everything linear in them?

The real images are a synthetic folder of tiny digits. Each run is a process of its own: inventory,
encoding, modes, sampling, a student, a report. Beside a busy machine read processor time, which is
that of the process alone.
"""

from __future__ import annotations

import csv
import io
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from eval.reports.drawings.figures import as_png, drawing, panels
from mgd3.runtime.errors import UserError
from mgd3.runtime.machine import commit
from mgd3.storage.files import write_atomic
from scripts.timings.stopwatch import Report

IPC, TRAIN, VAL = 5, 8, 2  # images per class: made, real, for tests
_ROOT = Path(__file__).resolve().parents[2]
_MEASURED = {
    "processor time, s": "processor_seconds",
    "wall time, s": "wall_seconds",
    "peak memory, MiB": "peak_mib",
    "files": "files",
}
Row = Mapping[str, float]


def write_digits(folder: Path, classes: int) -> None:
    """`classes` folders of digits, no two files the same."""
    from sklearn.datasets import load_digits

    source = (load_digits().images / 16 * 255).astype(np.uint8)
    number = 0
    for label in range(classes):
        for split, count in (("train", TRAIN), ("val", VAL)):
            place = folder / split / f"c{label:04d}"
            place.mkdir(parents=True)
            for k in range(count):
                pixels = source[number % len(source)].copy()
                pixels[0, 0], pixels[0, 7] = number % 251, number // 251  # corners are black
                Image.fromarray(pixels).convert("RGB").save(place / f"{k}.png")
                number += 1


def measured(classes: int, folder: Path) -> Row:
    """What a run of so many classes takes, start of Python included."""
    write_digits(folder / "images", classes)
    words = [
        "dataset=folder", f"dataset.root={folder / 'images'}", "dataset.student_size=8",
        "backbone=toy", "backbone.shift=0.001", f"ipc={IPC}", "students=[convnet2_w8]",
        "protocol=hard_label_short", "protocol.epochs_by_ipc=[[null,2]]", "compute=small",
        "compute.device=cpu", "tracker=none", "report=true",
    ]  # fmt: skip
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(_ROOT / "run.py"), *words],
            cwd=folder, stdout=log, stderr=log, env=one_thread,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"the run of {classes} classes failed: {(folder / 'log').read_text()}")
    left = [path for place in ("runs", "cache") for path in (folder / place).rglob("*")]
    return {
        "classes": classes,
        "processor_seconds": round(used.ru_utime + used.ru_stime, 2),
        "wall_seconds": round(wall, 2),
        "peak_mib": round(used.ru_maxrss / 1024),
        "files": sum(path.is_file() for path in left),
    }


def exponent(rows: Sequence[Row], name: str) -> float:
    """p of a + b classes^p through the first three rows; 1: linear, 2: quadratic.

    With ten times as many classes from row to row, 10^p is the ratio of the two increases.
    """
    first, second, third = (row[name] for row in rows[:3])
    step = rows[1]["classes"] / rows[0]["classes"]
    if third <= second or second <= first:
        return 0.0  # what does not grow
    return math.log((third - second) / (second - first)) / math.log(step)


def picture(rows: Sequence[Row]) -> bytes:
    """A PNG: each measurement against the number of classes, with the line through its ends."""
    with drawing():
        figure, axes = panels(1, len(_MEASURED), (3.6 * len(_MEASURED), 3.6))
        x = np.array([row["classes"] for row in rows])
        for axis, (title, name) in zip(axes[0], _MEASURED.items(), strict=True):
            y = np.array([row[name] for row in rows])
            slope = (y[-1] - y[0]) / (x[-1] - x[0])
            dense = np.geomspace(x[0], x[-1], 100)
            axis.plot(dense, y[0] + slope * (dense - x[0]), "--", color="grey", label="linear")
            axis.plot(x, y, "o", label="measured")
            axis.set(xscale="log", yscale="log", xlabel="classes", title=title)
            for scale, values in ((axis.xaxis, x), (axis.yaxis, y[[0, -1]])):
                scale.set_ticks(values, [f"{v:,.0f}" for v in values])
                scale.set_ticks([], minor=True)
            axis.set_ylim(y.min() / 2, y.max() * 2)
            axis.legend(fontsize=7)
        return as_png(figure, dpi=120)


def main(classes: list[int], out: str | None) -> None:
    """A table; with `out`, its rows and a picture in that folder."""
    steps = {b / a for a, b in pairwise(classes)}
    if len(classes) < 3 or len(steps) != 1 or steps.pop() <= 1:
        raise UserError(
            f"scale.classes={classes}: an exponent needs three numbers or more, each the same "
            "multiple of the one before, such as [10,100,1000]"
        )
    rows = []
    report = Report("classes", *_MEASURED)
    for count in classes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measured(count, Path(folder)))
        report.add(f"{count:,}", *(f"{rows[-1][name]:,}" for name in _MEASURED.values()))
    report.section()
    found = [f"{exponent(rows[-3:], name):.2f}" for name in _MEASURED.values()]
    report.add("exponent", *found)
    report.show()
    if out is None:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, [*rows[0], "commit"], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "commit": commit()} for row in rows)
    write_atomic(Path(out) / "rows.csv", text.getvalue().encode())
    write_atomic(Path(out) / "linearity.png", picture(rows))

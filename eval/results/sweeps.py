"""One key's values side by side: rows of a sweep named by it, and their picture."""

from __future__ import annotations

import io
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from eval.results.rows import EvalResult, order_of, read_results
from eval.results.tables import interval
from mgd3.data.distilled import MANIFEST
from mgd3.runtime.errors import UserError
from mgd3.runtime.files import read_json

Value = str | float


def rows_by(folder: Path, key: str) -> tuple[list[EvalResult], dict[str, Value]]:
    """All rows below `folder`, and the value of `key` by method name.

    A method that ran with several values is called «method key=value», one with a single value
    keeps its name and has no entry. `key` is a group (its choice is the value) or a dotted option
    of one. Raises `UserError` if no method has several values.
    """
    found: dict[str, set[Value]] = defaultdict(set)
    pairs: list[tuple[EvalResult, Value | None]] = []
    for row, manifest in _with_manifests(folder):
        value = row.protocol if key == "protocol" else value_of(manifest, key)
        pairs.append((row, value))
        if value is not None:
            found[row.method].add(value)
    several = {method for method, values in found.items() if len(values) > 1}
    if not several:
        raise UserError(
            f"--by {key}: no method below {folder} ran with more than one value; give a group such "
            "as modes, or an option such as guidance.scale"
        )
    rows, values = [], {}
    for row, value in pairs:
        if row.method in several and value is not None:
            row = replace(row, method=f"{row.method} {key.split('.')[-1]}={value}")
            values[row.method] = value
        rows.append(row)
    order = {value: k for k, value in enumerate(_sorted(set(values.values())))}
    rows.sort(key=lambda r: order.get(values.get(r.method), -1))  # type: ignore[arg-type]
    return rows, values


def sweep_picture(rows: Sequence[EvalResult], values: Mapping[str, Value], key: str) -> bytes:
    """A PNG: mean top1_last against the key's value, other methods as level lines.

    Bars and bands are 95 % t-intervals over distillation seeds; a panel for each dataset, IPC,
    protocol and student in which the key varies.
    """
    panels = order_of(_panel(r) for r in rows if r.method in values)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    ticks = _sorted(set(values.values()))
    for axis, panel in zip(axes[0], panels, strict=True):
        mine = [r for r in rows if _panel(r) == panel]
        points = {m: _interval(mine, m) for m in order_of(r.method for r in mine)}
        swept = sorted((m for m in points if m in values), key=lambda m: ticks.index(values[m]))
        x = [ticks.index(values[m]) for m in swept]
        means, halves = zip(*(points[m] for m in swept), strict=True)
        line = "-" if all(isinstance(v, float | int) for v in ticks) else ""
        axis.errorbar(x, means, yerr=halves, fmt=f"o{line}", capsize=3, color="black")
        for k, method in enumerate(m for m in points if m not in values):
            mean, half = points[method]
            axis.axhline(mean, label=method, color=f"C{k}", linestyle="--")
            axis.axhspan(mean - half, mean + half, color=f"C{k}", alpha=0.12, linewidth=0)
        names = [str(v) for v in ticks]
        turned = {} if line else {"rotation": 40, "ha": "right"}
        axis.set_xticks(range(len(ticks)), names, **turned)
        axis.set(xlabel=key, ylabel="top1_last, %", title=panel)
        if len(points) > len(swept):
            axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    plt.close(figure)
    return buffer.getvalue()


def _panel(row: EvalResult) -> str:
    return f"{row.dataset}, ipc {row.ipc}, {row.student}\n{row.protocol}"


def _with_manifests(folder: Path) -> list[tuple[EvalResult, dict[str, Any]]]:
    """Each row with the manifest of the set that it was trained on."""
    manifests: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.rglob("results.jsonl")):
        for row in read_results(path.parent):
            nearest = next(p for p in path.parents if (p / MANIFEST).is_file())
            manifests[row.cell_id, row.distill_seed] = read_json(nearest / MANIFEST)
    return [(r, manifests[r.cell_id, r.distill_seed]) for r in read_results(folder)]


def value_of(manifest: Mapping[str, Any], key: str) -> Value | None:
    """A group's choice or an option's value; None where the configuration has no such key."""
    if key in manifest.get("choices", {}):
        return manifest["choices"][key]
    value: Any = manifest["config"]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, str | float | int) else None


def _interval(rows: Sequence[EvalResult], method: str) -> tuple[float, float]:
    """Mean of the distillation seeds' means, and half its 95 % interval (0 for one seed)."""
    seeds: dict[int, list[float]] = defaultdict(list)
    for r in rows:
        if r.method == method:
            seeds[r.distill_seed].append(r.top1_last)
    mean, low, _ = interval([statistics.fmean(v) for v in seeds.values()])
    return mean, mean - low


def _sorted(values: set[Value]) -> list[Value]:
    """Numbers by size, then names."""
    return sorted(values, key=lambda v: (isinstance(v, str), v))

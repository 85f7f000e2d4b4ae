"""One HTML file that shows what a run, or a folder of runs, made: no network, no other files."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from torch import Tensor
from torchvision.utils import make_grid

from eval.embedding import embedding_picture
from eval.pictures import png
from eval.results import EvalResult, order_of, read_results
from eval.tables import cells, explanation, headers, table_rows
from eval.test_images import student_pixels
from mgd3.artifacts import write_atomic, write_json
from mgd3.datasets import RealDataset
from mgd3.distilled import MANIFEST, DistilledDataset
from mgd3.previews import load_previews
from mgd3.timing import StageTimes

_TEMPLATES = Path(__file__).parent / "templates"
_MOST_CLASSES, _MOST_IMAGES, _PIXELS = 10, 10, 64


def summarise(folder: Path, dataset: RealDataset, title: str) -> list[EvalResult]:
    """Write `summary.json` and `report.html` of all finished runs below `folder`."""
    rows = read_results(folder)
    sets = [DistilledDataset(p.parent) for p in sorted(folder.rglob(MANIFEST))]
    write_summary(folder / "summary.json", rows)
    write_report(folder / "report.html", rows, sets, dataset, title)
    return rows


def write_summary(path: Path, rows: Sequence[EvalResult]) -> None:
    """One JSON object per cell of the table, and what the numbers are."""
    content = {"rows": [asdict(c) for c in cells(rows)], "explanation": explanation(rows)}
    write_json(path, content)


def write_report(
    path: Path,
    rows: Sequence[EvalResult],
    sets: Sequence[DistilledDataset],
    dataset: RealDataset,
    title: str,
) -> None:
    """Table, images beside their modes, a 2-D picture, times and configuration, in one file."""
    first = first_of_each_method(sets)
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True)
    html = environment.get_template("report.html").render(
        title=title,
        headers=headers(),
        rows=table_rows(rows),
        explanation=explanation(rows),
        classes=_class_sheets(first, dataset),
        embedding=embedding_picture(dataset, first),
        times=_times(sets, rows),
        config=json.dumps({m: d.manifest["config"] for m, d in first.items()}, indent=2),
        commit=", ".join(order_of(r.commit for r in rows)),
    )
    write_atomic(path, html.encode())


def first_of_each_method(sets: Sequence[DistilledDataset]) -> dict[str, DistilledDataset]:
    """The lowest seed's set of each method."""
    found: dict[str, DistilledDataset] = {}
    for distilled in sorted(sets, key=lambda d: d.manifest["seed"]):
        found.setdefault(distilled.manifest["method"], distilled)
    return found


def image_strips(distilled: DistilledDataset) -> list[tuple[bytes, str]]:
    """One PNG strip per class (at most ten) with its name, for a tracker."""
    by_class = _first_images(distilled)
    return [
        (png(make_grid(by_class[c.wnid], nrow=_MOST_IMAGES, padding=1)), c.name)
        for c in distilled.classes[:_MOST_CLASSES]
    ]


def _class_sheets(first: dict[str, DistilledDataset], dataset: RealDataset) -> list[dict[str, Any]]:
    """Per class: one strip per method, and the modes' centroids and nearest real images."""
    images = {method: _first_images(d) for method, d in first.items()}
    previews = next((p for d in first.values() if (p := load_previews(d.folder))), {})
    sheets = []
    for info in dataset.classes[:_MOST_CLASSES]:
        strips = []
        if info.wnid in previews:
            centroids, nearest = previews[info.wnid]
            strips += [_strip("mode centroid", centroids), _strip("nearest real", nearest)]
        methods = sorted(images, key=lambda m: m != "mgd3")  # beside its modes
        strips += [_strip(method, images[method][info.wnid]) for method in methods]
        sheets.append({"name": f"{info.name} ({info.wnid})", "strips": strips})
    return sheets


def _first_images(distilled: DistilledDataset) -> dict[str, Tensor]:
    """By wnid: the first ten images, (K, 3, s, s) uint8."""
    wnids = [c.wnid for c in distilled.classes]
    found: dict[str, list[Tensor]] = {w: [] for w in wnids}
    for image, label in distilled.images():
        if label < _MOST_CLASSES and len(found[wnids[label]]) < _MOST_IMAGES:
            size = min(_PIXELS, *image.size)
            found[wnids[label]].append(student_pixels(image, size))
    return {w: torch.stack(images) for w, images in found.items() if images}


def _strip(label: str, pixels: Tensor) -> dict[str, Any]:
    data = base64.b64encode(png(make_grid(pixels, nrow=len(pixels), padding=0))).decode()
    return {"label": label, "uri": f"data:image/png;base64,{data}", "columns": len(pixels)}


def _times(
    sets: Sequence[DistilledDataset], rows: Sequence[EvalResult]
) -> list[tuple[str, str, str]]:
    """(method, stage, mean seconds): distillation per set, training per student."""
    out = []
    for method in order_of(d.manifest["method"] for d in sets):
        times = [
            StageTimes(d.folder / "times.json").read()
            for d in sets
            if d.manifest["method"] == method
        ]
        for stage in order_of(stage for t in times for stage in t):
            mean = sum(t.get(stage, 0.0) for t in times) / len(times)
            out.append((method, f"{stage} (per set)", f"{mean:.2f}"))
        for student in order_of(r.student for r in rows):
            mine = [r for r in rows if r.method == method and r.student == student]
            if mine:
                train = sum(r.train_seconds for r in mine) / len(mine)
                test = sum(r.test_seconds for r in mine) / len(mine)
                out.append((method, f"{student}: training", f"{train:.2f}"))
                out.append((method, f"{student}: tests", f"{test:.2f}"))
    return out

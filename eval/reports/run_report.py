"""One HTML file that shows what a run, or a folder of runs, made: no network, no other files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup, escape
from torch import Tensor
from torchvision.utils import make_grid

from eval.reports.embedding import embedding_picture
from eval.reports.pictures import data_uri
from eval.reports.samples import MOST_CLASSES, first_images, first_of_each_method
from eval.results.costs import cost_layout
from eval.results.rows import EvalResult, order_of
from eval.results.tables import (
    REFERENCE,
    cells,
    explanation,
    layout,
    paired_difference,
)
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import MANIFEST, DistilledDataset
from mgd3.data.previews import load_previews
from mgd3.runtime.files import write_atomic, write_json

_TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> Template:
    """A page's template; its filter «emphasised» turns Markdown's *i* and **b** into HTML's."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True)
    environment.filters["emphasised"] = _emphasised
    return environment.get_template(name)


def _emphasised(text: str) -> Markup:
    html = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", str(escape(text)))
    return Markup(re.sub(r"\*(.+?)\*", r"<i>\1</i>", html))


def distilled_sets(folder: Path) -> list[DistilledDataset]:
    """All finished distilled datasets below `folder`."""
    return [DistilledDataset(path.parent) for path in sorted(folder.rglob(MANIFEST))]


def named(
    sets: Sequence[DistilledDataset], rows: Sequence[EvalResult]
) -> tuple[list[tuple[str, DistilledDataset]], list[tuple[str, EvalResult]]]:
    """Sets and rows with their methods' names; a sweep's rows leave out the swept value."""
    return [(d.manifest["method"], d) for d in sets], [(r.method.split(" ")[0], r) for r in rows]


def write_summary(path: Path, rows: Sequence[EvalResult]) -> None:
    """One JSON object per cell of the table, and what the numbers are."""
    content = []
    for cell in cells(rows):
        difference = paired_difference(rows, cell, REFERENCE)
        paired = {f"minus_{REFERENCE}": asdict(difference)} if difference else {}
        content.append(asdict(cell) | paired)
    write_json(path, {"rows": content, "explanation": explanation(rows)})


def write_report(
    path: Path,
    rows: Sequence[EvalResult],
    sets: Sequence[DistilledDataset],
    dataset: RealDataset,
    title: str,
) -> None:
    """Table, images beside their modes, a 2-D picture, times and configuration, in one file."""
    first = first_of_each_method(sets)
    html = template("report.html").render(
        title=title,
        table=layout(rows),
        explanation=explanation(rows),
        classes=class_sheets(first),
        embedding=embedding_picture(dataset, first),
        costs=cost_layout(*named(sets, rows)),
        config=json.dumps({m: d.manifest["config"] for m, d in first.items()}, indent=2),
        commit=", ".join(order_of(r.commit for r in rows)),
    )
    write_atomic(path, html.encode())


def class_sheets(first: Mapping[str, DistilledDataset]) -> list[dict[str, Any]]:
    """Per class: one strip for each named set, and the modes' centroids and nearest real images."""
    classes = next(iter(first.values())).classes
    images = {method: first_images(d) for method, d in first.items()}
    choices = {name: d.manifest.get("choices", {}) for name, d in first.items()}
    guided = [name for name in first if choices[name].get("guidance") == "mode"]
    shown = next((n for n in [*guided[::-1], *first] if load_previews(first[n].folder)), None)
    previews = load_previews(first[shown].folder) if shown else {}
    of = f" ({shown})" if len(first) > 1 else ""
    sheets = []
    for info in classes[:MOST_CLASSES]:
        strips = []
        if info.wnid in previews:
            centroids, nearest = previews[info.wnid]
            strips += [_strip(f"mode centroid{of}", centroids), _strip("nearest real", nearest)]
        strips += [_strip(method, images[method][info.wnid]) for method in images]
        sheets.append({"name": f"{info.name} ({info.wnid})", "strips": strips})
    return sheets


def _strip(label: str, pixels: Tensor) -> dict[str, Any]:
    return {
        "label": label,
        "uri": data_uri(make_grid(pixels, nrow=len(pixels), padding=1, pad_value=128)),
        "columns": len(pixels),
    }

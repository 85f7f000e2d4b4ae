"""One HTML file that shows what a run, or a folder of runs, made: no network, no other files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from eval.reports.embedding import embedding_picture
from eval.reports.pictures import data_uri, grid
from eval.reports.samples import (
    MOST_CLASSES,
    first_images,
    first_of_each_method,
    with_previews,
)
from eval.results.cells import cells
from eval.results.costs import cost_layout
from eval.results.layout import Layout, spans
from eval.results.rows import UNGUIDED, EvalResult, order_of
from eval.results.tables import explanation, layout, minus_unguided
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import MANIFEST, DistilledDataset
from mgd3.data.previews import load_previews
from mgd3.runtime.progress import track
from mgd3.storage.files import write_atomic, write_json

if TYPE_CHECKING:
    from jinja2 import Template

log = logging.getLogger(__name__)

_TEMPLATES = Path(__file__).parent / "templates"


def template(name: str) -> Template:
    """A page's template; its filter «spans» takes a table's entry apart."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True)
    environment.filters["spans"] = spans
    return environment.get_template(name)


def distilled_sets(folder: Path) -> list[DistilledDataset]:
    """All finished distilled datasets below `folder`."""
    return [DistilledDataset(path.parent) for path in sorted(folder.rglob(MANIFEST))]


def parted(
    sets: Sequence[DistilledDataset],
) -> tuple[list[DistilledDataset], list[DistilledDataset]]:
    """Sets that hold their images, and, with a line that says so, those whose images are away."""
    elsewhere = [d for d in sets if d.manifest.get("elsewhere")]
    for distilled in elsewhere:
        log.warning("left out: the images of %s lie elsewhere", distilled.folder)
    return [d for d in sets if d not in elsewhere], elsewhere


def named(
    sets: Sequence[DistilledDataset], rows: Sequence[EvalResult]
) -> tuple[list[tuple[str, DistilledDataset]], list[tuple[str, EvalResult]]]:
    """Sets and rows with their methods' names; a sweep's rows without the swept value."""
    return [(d.manifest["method"], d) for d in sets], [(r.method, r) for r in rows]


def write_summary(path: Path, rows: Sequence[EvalResult]) -> None:
    """One JSON object per cell of the table, and what the numbers are."""
    found = cells(rows)
    content = [
        asdict(cell) | ({f"minus_{UNGUIDED}": asdict(difference)} if difference else {})
        for cell, difference in zip(found, minus_unguided(rows, found), strict=True)
    ]
    write_json(path, {"rows": content, "explanation": explanation(rows)})


def write_report(
    path: Path,
    rows: Sequence[EvalResult],
    sets: Sequence[DistilledDataset],
    dataset: RealDataset | None,
    title: str,
    hidden: Sequence[tuple[Layout, Sequence[str]]] = (),
) -> None:
    """Table, images beside their modes, a 2-D picture, times and configuration, in one file.

    Without the real dataset there is no 2-D picture. `hidden`: tables of hidden modes, and what
    they allow to say.
    """
    first = first_of_each_method(sets)
    html = template("report.html").render(
        title=title,
        table=layout(rows),
        explanation=explanation(rows),
        hidden=hidden,
        classes=class_sheets(first),
        embedding=embedding_picture(dataset, first) if dataset and first else "",
        costs=cost_layout(*named(sets, rows)),
        config=json.dumps({m: d.manifest["config"] for m, d in first.items()}, indent=2),
        commit=", ".join(order_of(r.commit for r in rows)),
    )
    write_atomic(path, html.encode())


def class_sheets(first: Mapping[str, DistilledDataset]) -> list[dict[str, Any]]:
    """Per class: one strip for each named set, and the modes' centroids and nearest real images."""
    if not first:
        return []
    classes = next(iter(first.values())).classes
    named_sets = track(first.items(), "reading images for the sheets", len(first), "sets")
    images = {method: first_images(d) for method, d in named_sets}
    shown = with_previews(first)
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
        "uri": data_uri(grid(pixels, len(pixels), pad_value=128)),
        "columns": len(pixels),
    }

"""One HTML file that shows what a run, or a folder of runs, made: no network, no other files."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from eval.reports.drawings.pictures import data_uri, grid
from eval.reports.embedding import embedding_picture
from eval.reports.samples import MOST_CLASSES, first_images, first_of_each, with_previews
from eval.results.cells import cells, names_by_cell
from eval.results.costs import cost_layout
from eval.results.layout import Layout, spans
from eval.results.rows import UNGUIDED, EvalResult, order_of, read_results
from eval.results.tables import explanation, layout, minus_unguided
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import MANIFEST, DistilledDataset
from mgd3.data.previews import load_previews
from mgd3.runtime.progress import track
from mgd3.storage.files import write_atomic, write_json

if TYPE_CHECKING:
    from jinja2 import Template

log = logging.getLogger(__name__)

_MOST_MAPS = 6  # panels side by side, each of which takes its part of one t-SNE
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


def row_names(sets: Sequence[DistilledDataset], rows: Sequence[EvalResult]) -> dict[Path, str]:
    """By each set's folder the name that the table of `rows` has for it.

    A set with several names, such as of two protocols, has them all; one without rows its method's.
    """
    cell_names = names_by_cell(rows)
    by_key = {replace(r, variant=None).key: cell_names[r.cell] for r in rows}
    found = {}
    for distilled in sets:
        keys = [r.key for r in read_results(distilled.folder)]
        names = order_of(by_key[key] for key in keys if key in by_key)
        found[distilled.folder] = " / ".join(names) or distilled.manifest["method"]
    return found


def first_of_each_row(
    sets: Sequence[DistilledDataset], rows: Sequence[EvalResult]
) -> dict[str, DistilledDataset]:
    """The lowest seed's set of each row of the table, by the row's name; by IPC if they differ."""
    names, several = row_names(sets, rows), len({d.ipc for d in sets}) > 1
    place = {name: k for k, name in enumerate(order_of(names_by_cell(rows).values()))}
    ordered = sorted(sets, key=lambda d: (d.ipc, place.get(names[d.folder], len(place))))
    labels = [names[d.folder] + (f", ipc {d.ipc}" if several else "") for d in ordered]
    return first_of_each(ordered, labels)


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
    keep: Path | None = None,
) -> None:
    """Table, images beside their modes, a 2-D picture, times and configuration, in one file.

    Images are of the first set of each row, under the row's name. Without the real dataset there is
    no 2-D picture. `hidden`: tables of hidden modes, and what
    they allow to say. `keep` is a folder for the picture's fit, which takes seconds.
    """
    first = first_of_each_row(sets, rows)
    mapped = dict(list(first.items())[:_MOST_MAPS])
    html = template("report.html").render(
        title=title,
        table=layout(rows),
        explanation=explanation(rows),
        hidden=hidden,
        classes=class_sheets(first),
        embedding=embedding_picture(dataset, mapped, keep) if dataset and mapped else "",
        unmapped=len(first) - len(mapped),
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
    sheets = []
    for info in classes[:MOST_CLASSES]:
        strips = []
        if info.wnid in previews:
            centroids, nearest = previews[info.wnid]
            strips += [_strip(f"mode centroid ({shown})", centroids)]
            strips += [_strip(f"nearest real ({shown})", nearest)]
        strips += [_strip(method, images[method][info.wnid]) for method in images]
        sheets.append({"name": f"{info.name} ({info.wnid})", "strips": strips})
    return sheets


def _strip(label: str, pixels: Tensor) -> dict[str, Any]:
    return {
        "label": label,
        "uri": data_uri(grid(pixels, len(pixels), pad_value=128)),
        "columns": len(pixels),
    }

"""One HTML file for a table or figure of the paper: numbers, curves, samples, maps, costs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.metrics.planes import Plane, TsneScores, tsne_scores
from eval.reports.comparison import KEY, PaperComparison
from eval.reports.curves import accuracy_pictures, diversity_picture, swept_diversity_picture
from eval.reports.embedding import embedding_planes
from eval.reports.maps import maps_picture
from eval.reports.run_report import class_sheets, template
from eval.reports.samples import overview_of
from eval.results.costs import cost_layout
from eval.results.layout import Layout
from eval.results.rows import EvalResult
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.storage.files import write_atomic


@dataclass(frozen=True, kw_only=True)
class Section:
    """The sets of one dataset and IPC, by the paper's rows; the first set of each is shown."""

    title: str
    sets: Mapping[str, Sequence[DistilledDataset]]
    real: RealDataset | None  # None: not on this machine
    tables: Sequence[Layout] = ()
    planes: Mapping[str, Plane] = field(default_factory=dict)
    scores: Mapping[str, TsneScores] = field(default_factory=dict)

    @property
    def first(self) -> dict[str, DistilledDataset]:
        """The first seed's set of each row."""
        return {row: sets[0] for row, sets in self.sets.items()}


def write_paper_report(
    path: Path,
    comparison: PaperComparison,
    sections: Sequence[Section],
    sets: Sequence[tuple[str, DistilledDataset]],
    rows: Sequence[tuple[str, EvalResult]],
    real_images: bool,
) -> list[tuple[bytes, str]]:
    """Write the report; returns its pictures as PNGs with captions, for a tracker.

    Copies of real images are in those pictures only with `real_images`.
    `sections` are looked at, all `sets` and `rows`, by their cells' names, are linked and timed.
    """
    curves = accuracy_pictures(comparison)
    pages, pictures = [], [(png, caption) for _, png, caption in curves]
    for section in sections:
        page, diversity = _page(section, comparison.swept)
        pages.append(page)
        pictures += [(diversity, f"diversity, {section.title}")] if diversity else []
        shown = {row: d for row, d in section.first.items() if real_images or d.generated}
        pictures += [(overview_of(shown), f"samples, {section.title}")] if shown else []
    configs = {
        f"{section.title}, {row}": distilled.manifest["config"]
        for section in sections
        for row, distilled in section.first.items()
    }
    html = template("paper.html").render(
        title=comparison.title,
        matrix=comparison.matrix() if comparison.cells else None,
        details=comparison.details() if comparison.cells else None,
        orderings=comparison.orderings(),
        key=KEY,
        notes=comparison.remarks_and_notes(),
        curves=[svg for svg, _, _ in curves],
        sections=pages,
        costs=cost_layout(sets, rows),
        runs=_links(path, sets),
        config=json.dumps(configs, indent=2),
    )
    write_atomic(path, html.encode())
    return pictures


def _page(
    section: Section, swept: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Any], bytes]:
    """What the template shows of a section, and its picture of diversity (empty: none)."""
    planes, scores = section.planes, section.scores
    if not planes and section.real is not None:
        planes = embedding_planes(section.real, section.first)
        scores = tsne_scores(planes["t-SNE of pixels"]) if planes else {}
    points = {
        row: (s.representativeness_mean, s.diversity_mean)
        for row, s in scores.items()
        if s.representativeness_mean is not None and s.diversity_mean is not None
    }
    key, values = next(iter(swept.items()), ("", {}))
    if swept:
        points = {row: point for row, point in points.items() if row in values}
    svg, png = "", b""
    if len(points) > 1 and swept:
        svg, png = swept_diversity_picture(points, section.title, key, values)
    elif len(points) > 1:
        svg, png = diversity_picture(points, section.title)
    page = {
        "title": section.title,
        "classes": class_sheets(section.first),
        "maps": maps_picture(planes) if planes else "",
        "diversity": svg,
        "tables": section.tables,
    }
    return page, png


def _links(path: Path, sets: Sequence[tuple[str, DistilledDataset]]) -> list[dict[str, str]]:
    """Every set's folder, relative to the report."""
    found = []
    for name, distilled in sets:
        seed = distilled.manifest.get("seed")
        parts = [name, f"ipc {distilled.ipc}", *([] if seed is None else [f"seed {seed}"])]
        href = os.path.relpath(distilled.folder, path.parent)
        found.append({"name": ", ".join(parts), "href": href})
    return found

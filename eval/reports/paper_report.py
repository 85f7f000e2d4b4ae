"""One HTML file for a table or figure of the paper: numbers, curves, samples, maps, costs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval.metrics.planes import Plane, TsneScores, tsne_points, tsne_scores
from eval.reports.comparison import KEY, PaperComparison
from eval.reports.drawings.curves import (
    Point,
    accuracy_pictures,
    diversity_picture,
    swept_diversity_picture,
)
from eval.reports.drawings.maps import maps_picture
from eval.reports.drawings.pictures import png_uri
from eval.reports.drawings.step_pictures import Trail, steps_picture
from eval.reports.embedding import embedding_planes
from eval.reports.run_report import class_sheets, template
from eval.reports.samples import overview_of
from eval.results.costs import cost_layout
from eval.results.layout import Layout
from eval.results.rows import EvalResult
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.storage.files import write_atomic


@dataclass(frozen=True)
class Picture:
    """A picture of the report as PNG bytes."""

    caption: str
    png: bytes
    without_real: bytes | None  # the same without copies of real images; None: nothing is left

    @property
    def file(self) -> str:
        """Its name beside the report: the caption in plain letters."""
        return "-".join(re.findall(r"\w+", self.caption.lower())) + ".png"


@dataclass(frozen=True, kw_only=True)
class Section:
    """The sets of one dataset and IPC, by the paper's rows; the first set of each is shown."""

    title: str
    sets: Mapping[str, Sequence[DistilledDataset]]
    real: RealDataset | None  # None: not on this machine
    tables: Sequence[Layout] = ()
    planes: Mapping[str, Plane] = field(default_factory=dict)
    scores: Mapping[str, TsneScores] = field(default_factory=dict)
    class_planes: Mapping[str, Plane] = field(default_factory=dict)  # of single classes
    points: str = "set"  # what a point of the picture of diversity is: a set, a class, an image
    trails: Sequence[Trail] = ()  # images on their way
    keep: Path | None = None  # a folder for maps that were fitted

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
    """Write the report and its pictures beside it; returns them with captions, for a tracker.

    Copies of real images are in what is returned only with `real_images`.
    `sections` are looked at, all `sets` and `rows`, by their cells' names, are linked and timed.
    """
    curves = accuracy_pictures(comparison)
    pages, pictures = [], [Picture(caption, png, png) for _, png, caption in curves]
    for section in sections:
        page, drawn = _page(section, comparison.swept)
        pages.append(page)
        pictures += drawn
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
        origins=[c for c in comparison.cells if c.command],
        notes=comparison.remarks_and_notes(),
        curves=[svg for svg, _, _ in curves],
        sections=pages,
        costs=cost_layout(sets, rows),
        runs=_links(path, sets),
        config=json.dumps(configs, indent=2),
    )
    write_atomic(path, html.encode())
    for picture in pictures:
        write_atomic(path.parent / picture.file, picture.png)
    found = [(p.png if real_images else p.without_real, p.caption) for p in pictures]
    return [(png, caption) for png, caption in found if png is not None]


def _page(
    section: Section, swept: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Any], list[Picture]]:
    """What the template shows of a section, and its pictures."""
    planes, scores = section.planes, section.scores
    if not planes and section.real is not None:
        planes = embedding_planes(section.real, section.first, section.keep)
        scores = tsne_scores(planes["t-SNE of pixels"]) if planes else {}
    drawn: list[Picture] = []
    page: dict[str, Any] = {
        "title": section.title,
        "classes": class_sheets(section.first),
        "points": section.points if "t-SNE" in planes else "set",
        "tables": section.tables,
    }
    page["maps"] = []
    for what, found in (("maps of classes", section.class_planes), ("maps", planes)):
        if found:
            svg, png = maps_picture(found)
            page["maps"].append(svg)
            drawn.append(Picture(f"{what}, {section.title}", png, png))
    page["diversity"], png = _diversity(section, planes, scores, swept)
    if png:
        drawn.append(Picture(f"diversity, {section.title}", png, png))
    if section.trails:
        png = steps_picture(section.trails)
        page["steps"] = png_uri(png)
        bare = steps_picture([replace(trail, modes={}) for trail in section.trails])
        drawn.append(Picture(f"denoising, {section.title}", png, bare))
    if first := section.first:
        generated = {row: d for row, d in first.items() if d.generated}
        bare_overview = overview_of(generated) if generated else None
        whole = bare_overview if generated == first and bare_overview else overview_of(first)
        drawn.append(Picture(f"samples, {section.title}", whole, bare_overview))
    return page, drawn


def _diversity(
    section: Section,
    planes: Mapping[str, Plane],
    scores: Mapping[str, TsneScores],
    swept: Mapping[str, Mapping[str, float]],
) -> tuple[str, bytes]:
    """SVG and PNG of both scores, against the first swept key; empty for nothing to compare."""
    for key, values in swept.items():
        found = {row: point for row, point in _of_sets(scores).items() if row in values}
        if len(found) > 1:
            return swept_diversity_picture(found, section.title, key, values)
        return "", b""
    points = _points(section, planes, scores)
    return diversity_picture(points, section.title) if len(points) > 1 else ("", b"")


def _of_sets(scores: Mapping[str, TsneScores]) -> dict[str, Point]:
    """Each row's point, of all its images."""
    return {
        row: (s.representativeness_mean, s.diversity_mean)
        for row, s in scores.items()
        if s.representativeness_mean is not None and s.diversity_mean is not None
    }


def _points(
    section: Section, planes: Mapping[str, Plane], scores: Mapping[str, TsneScores]
) -> dict[str, list[Point]]:
    """Each row's points in the map of all classes."""
    if section.points == "set" or "t-SNE" not in planes:
        return {row: [point] for row, point in _of_sets(scores).items()}
    found = tsne_points(planes["t-SNE"], section.points)
    return {row: [(x, y) for x, y in rows.tolist()] for row, rows in found.items() if len(rows)}


def _links(path: Path, sets: Sequence[tuple[str, DistilledDataset]]) -> list[dict[str, str]]:
    """Every set's folder, relative to the report."""
    found = []
    for name, distilled in sets:
        seed = distilled.manifest.get("seed")
        parts = [name, f"ipc {distilled.ipc}", *([] if seed is None else [f"seed {seed}"])]
        href = os.path.relpath(distilled.folder, path.parent)
        found.append({"name": ", ".join(parts), "href": href})
    return found

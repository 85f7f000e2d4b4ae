"""One HTML file for a table or figure of the paper: numbers, curves, samples, maps, costs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.metrics.planes import Plane, TsneScores, tsne_points, tsne_scores
from eval.reports.comparison import KEY, PaperComparison
from eval.reports.curves import (
    Point,
    accuracy_pictures,
    diversity_picture,
    swept_diversity_picture,
)
from eval.reports.embedding import embedding_planes
from eval.reports.maps import maps_picture
from eval.reports.pictures import png_uri
from eval.reports.run_report import class_sheets, template
from eval.reports.samples import overview_of
from eval.reports.step_pictures import Trail, steps_picture
from eval.results.costs import cost_layout
from eval.results.layout import Layout
from eval.results.rows import EvalResult
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.storage.files import write_atomic


def picture_name(caption: str) -> str:
    """A file's name for a picture: its caption in plain letters."""
    return "-".join(re.findall(r"\w+", caption.lower())) + ".png"


@dataclass(frozen=True, kw_only=True)
class Section:
    """The sets of one dataset and IPC, by the paper's rows; the first set of each is shown."""

    title: str
    sets: Mapping[str, Sequence[DistilledDataset]]
    real: RealDataset | None  # None: not on this machine
    tables: Sequence[Layout] = ()
    planes: Mapping[str, Plane] = field(default_factory=dict)
    scores: Mapping[str, TsneScores] = field(default_factory=dict)
    points: str = "set"  # what a point of the picture of diversity is: a set, a class, an image
    trails: Sequence[Trail] = ()  # images on their way

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
    sweep: str | None,
    real_images: bool,
) -> list[tuple[bytes, str]]:
    """Write the report; returns its pictures as PNGs with captions, for a tracker.

    Copies of real images are in those pictures only with `real_images`.
    `sections` are looked at, all `sets` and `rows`, by their cells' names, are linked and timed.
    """
    curves = accuracy_pictures(comparison, sweep)
    pages, pictures = [], [(png, caption) for _, png, caption in curves]
    for section in sections:
        page, drawn = _page(section, comparison.values, sweep)
        pages.append(page)
        pictures += [(png, f"{what}, {section.title}") for what, png in drawn.items()]
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
    section: Section, values: Mapping[str, float], sweep: str | None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What the template shows of a section, and its pictures as PNGs by what they show."""
    planes, scores = section.planes, section.scores
    if not planes and section.real is not None:
        planes = embedding_planes(section.real, section.first)
        scores = tsne_scores(planes["t-SNE of pixels"]) if planes else {}
    drawn: dict[str, bytes] = {}
    maps = diversity = steps = ""
    if planes:
        maps, drawn["maps"] = maps_picture(planes)
    if sweep:
        swept = {row: p for row, p in _of_sets(scores).items() if row in values}
        if len(swept) > 1:
            diversity, drawn["diversity"] = swept_diversity_picture(
                swept, section.title, sweep, values
            )
    else:
        points = _points(section, planes, scores)
        if len(points) > 1:
            diversity, drawn["diversity"] = diversity_picture(points, section.title)
    if section.trails:
        drawn["denoising"] = steps_picture(section.trails)
        steps = png_uri(drawn["denoising"])
    page = {
        "title": section.title,
        "classes": class_sheets(section.first),
        "maps": maps,
        "diversity": diversity,
        "points": section.points if "t-SNE" in planes else "set",
        "steps": steps,
        "tables": section.tables,
    }
    return page, drawn


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

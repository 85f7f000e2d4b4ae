"""One HTML file for a table or figure of the paper: numbers, curves, samples, maps, costs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from eval.metrics.planes import Plane, TsneScores, maps_picture, tsne_scores
from eval.reports.comparison import KEY, PaperComparison, TableCell
from eval.reports.embedding import embedding_planes
from eval.reports.run_report import class_sheets, template
from eval.reports.samples import overview_of
from eval.results.costs import cost_layout
from eval.results.rows import EvalResult, order_of
from eval.results.tables import Layout
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.files import write_atomic


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
    sweep: str | None,
) -> list[tuple[bytes, str]]:
    """Write the report; returns its pictures as PNGs with captions, for a tracker.

    `sections` are looked at, all `sets` and `rows`, by their cells' names, are linked and timed.
    """
    curves = accuracy_pictures(comparison, sweep)
    pages, pictures = [], [(png, caption) for _, png, caption in curves]
    for section in sections:
        planes, scores = section.planes, section.scores
        if not planes and section.real is not None:
            planes = embedding_planes(section.real, section.first)
            scores = tsne_scores(planes["t-SNE of pixels"]) if planes else {}
        points = {
            row: (s.representativeness_mean, s.diversity_mean)
            for row, s in scores.items()
            if s.representativeness_mean is not None and s.diversity_mean is not None
        }
        draw = _diversity
        if sweep:
            points = {row: p for row, p in points.items() if swept_value(row) is not None}
            draw = partial(_against_key, key=sweep)
        svg, png = draw(points, title=section.title) if len(points) > 1 else ("", b"")
        pages.append(
            {
                "title": section.title,
                "classes": class_sheets(section.first),
                "maps": maps_picture(planes) if planes else "",
                "diversity": svg,
                "tables": section.tables,
            }
        )
        pictures += [(png, f"diversity, {section.title}")] if png else []
        pictures.append((overview_of(section.first), f"samples, {section.title}"))
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
        config=json.dumps(
            {
                f"{s.title}, {row}": d.manifest["config"]
                for s in sections
                for row, d in s.first.items()
            },
            indent=2,
        ),
    )
    write_atomic(path, html.encode())
    return pictures


def accuracy_pictures(
    comparison: PaperComparison, sweep: str | None
) -> list[tuple[str, bytes, str]]:
    """SVG, PNG and caption for each dataset and student: accuracy against IPC, or the sweep's key.

    Filled marks are our means and standard deviations of the best test, hollow ones with thin bars
    the paper's. One IPC alone has a line per row.
    """
    found = []
    for dataset, student in order_of((c.dataset, c.student) for c in comparison.cells):
        cells = [
            c
            for c in comparison.cells
            if (c.dataset, c.student) == (dataset, student) and c.ipc != "full"
        ]
        if not any(c.ours for c in cells):
            continue
        ipcs = sorted({int(c.ipc) for c in cells})
        across = len(ipcs) > 1 and sweep is None
        figure, axis = plt.subplots(
            figsize=(7, 4.2) if across or sweep else (7, 0.34 * len(cells) + 1.1),
            layout="constrained",
        )
        if across:
            _against_ipc(axis, cells, ipcs)
        else:
            _by_row(axis, cells, sweep)
        axis.set_title(f"{dataset}, {student}")
        svg, png = _both(figure)
        found.append((svg, png, f"accuracy, {dataset}, {student}"))
    return found


def swept_value(row: str) -> float | None:
    """The number that a sweep's row ends in; None for other rows beside the sweep."""
    try:
        return float(row.split()[-1])
    except ValueError:
        return None


def _against_ipc(axis: plt.Axes, cells: Sequence[TableCell], ipcs: Sequence[int]) -> None:
    for k, row in enumerate(order_of(c.row for c in cells)):
        mine = sorted((c for c in cells if c.row == row), key=lambda c: int(c.ipc))
        shift = 0.02 * (k - 4)  # on the logarithmic axis, so that bars do not hide each other
        colour = f"C{k % 10}"
        ours = [(int(c.ipc) * (1 + shift), *score) for c in mine if (score := c.score("top1_best"))]
        paper = [(int(c.ipc) * (1 + shift), *c.paper) for c in mine if c.paper]
        if ours:
            x, y, half = zip(*ours, strict=True)
            axis.errorbar(x, y, yerr=half, fmt="o-", color=colour, capsize=3, label=row)
        if paper:
            x, y, std = zip(*paper, strict=True)
            name = None if ours else f"{row} (paper alone)"
            hollow = {"fmt": "o", "mfc": "none", "color": colour, "elinewidth": 0.7}
            axis.errorbar(x, y, yerr=[s or 0 for s in std], label=name, **hollow)
    axis.set_xscale("log")
    axis.set_xticks(ipcs, [str(i) for i in ipcs])
    axis.minorticks_off()
    axis.set(xlabel="images per class", ylabel="top-1, best test, %")
    axis.legend(fontsize=7, ncols=2)


def _by_row(axis: plt.Axes, cells: Sequence[TableCell], sweep: str | None) -> None:
    if sweep:
        cells = [c for c in cells if swept_value(c.row) is not None]
    places = range(len(cells))
    ours = [(k, *score) for k, c in enumerate(cells) if (score := c.score("top1_best"))]
    paper = [(k, *c.paper) for k, c in enumerate(cells) if c.paper]
    for points, style in (
        (ours, {"fmt": "o-" if sweep else "o", "capsize": 3, "label": "ours"}),
        (paper, {"fmt": "o", "mfc": "none", "elinewidth": 0.7, "label": "paper"}),
    ):
        if points:
            at, mean, half = zip(*points, strict=True)
            bars = {"yerr" if sweep else "xerr": [h or 0 for h in half]}
            x, y = (at, mean) if sweep else (mean, at)
            colour = "black" if style["label"] == "ours" else "C1"
            axis.errorbar(x, y, **bars, color=colour, **style)
    if sweep:
        axis.set_xticks(places, [c.row.split()[-1] for c in cells])
        axis.set(xlabel=sweep, ylabel="top-1, best test, %")
    else:
        names = [
            f"{c.row}, ipc {c.ipc}" if len({x.ipc for x in cells}) > 1 else c.row for c in cells
        ]
        axis.set_yticks(places, names)
        axis.invert_yaxis()
        axis.set_xlabel("top-1, best test, %")
    axis.legend(fontsize=8)


def _diversity(points: Mapping[str, tuple[float, float]], title: str) -> tuple[str, bytes]:
    """A picture of (representativeness, diversity) in the t-SNE plane, a mark per row."""
    figure, axis = plt.subplots(figsize=(5.5, 4), layout="constrained")
    for k, (row, point) in enumerate(points.items()):
        axis.scatter(*point, marker="os^Dv"[k // 10 % 5], label=row)
    axis.set(xlabel="representativeness", ylabel="diversity", title=title)
    axis.legend(fontsize=7)
    return _both(figure)


def _against_key(
    points: Mapping[str, tuple[float, float]], title: str, key: str
) -> tuple[str, bytes]:
    """A picture of both scores in the t-SNE plane against the key that rows vary."""
    found = sorted((swept_value(row), *point) for row, point in points.items())
    x, representative, diverse = zip(*found, strict=True)
    figure, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    axis.plot(x, diverse, "o-", label="diversity")
    axis.plot(x, representative, "s-", label="representativeness")
    axis.set(xlabel=key, title=title)
    axis.legend(fontsize=8)
    return _both(figure)


def _both(figure: plt.Figure) -> tuple[str, bytes]:
    """A figure as SVG text and as PNG bytes; closed."""
    text, data = io.StringIO(), io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "report"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    figure.savefig(data, format="png", dpi=110)
    plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :], data.getvalue()


def _links(path: Path, sets: Sequence[tuple[str, DistilledDataset]]) -> list[dict[str, str]]:
    """Every set's folder, relative to the report."""
    return [
        {
            "name": f"{name}, ipc {distilled.ipc}, seed {distilled.manifest['seed']}",
            "href": os.path.relpath(distilled.folder, path.parent),
        }
        for name, distilled in sets
    ]

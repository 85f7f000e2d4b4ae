"""Pictures of scores: accuracy against a sweep's key or IPC, diversity by row or key."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from eval.reports.comparison import PaperComparison
from eval.reports.drawings.figures import as_png, as_svg, drawing, panels
from eval.reports.paper_cell import TableCell
from eval.results.rows import EvalResult, order_of
from eval.results.statistics import interval, scores_by_set, units
from eval.results.sweeps import Value, in_order_of_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]  # representativeness, diversity


def sweep_picture(rows: Sequence[EvalResult], values: Mapping[str, Value], key: str) -> bytes:
    """A PNG: mean top1_last against the key's value by variant, other methods as level lines.

    Bars and bands are 95 % t-intervals over distillation seeds (over students, where a method has
    none); a panel for each dataset, IPC, protocol and student in which the key varies.
    """
    titles = order_of(_panel(r) for r in rows if r.variant in values)
    ticks = in_order_of_size(values.values())
    with drawing():
        figure, axes = panels(1, len(titles), (5.2 * len(titles), 3.8))
        for axis, title in zip(axes[0], titles, strict=True):
            _sweep(axis, [r for r in rows if _panel(r) == title], values, ticks)
            axis.set(xlabel=key, ylabel="top1_last, %", title=title)
        return as_png(figure, dpi=120)


def accuracy_pictures(comparison: PaperComparison) -> list[tuple[str, bytes, str]]:
    """SVG, PNG and caption for each dataset and student: accuracy against IPC, or a swept key.

    Filled marks are our means and standard deviations of the best test, hollow ones with thin bars
    the paper's. One IPC alone has a line per row, a sweep a panel per key.
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
        title = f"{dataset}, {student}"
        found.append((*_accuracy(comparison, cells, title), f"accuracy, {title}"))
    return found


def _accuracy(
    comparison: PaperComparison, cells: Sequence[TableCell], title: str
) -> tuple[str, bytes]:
    ipcs = sorted({int(c.ipc) for c in cells})
    with drawing():
        if swept := comparison.swept:
            figure, axes = panels(1, len(swept), (max(7, 4.6 * len(swept)), 4.2))
            for axis, (key, values) in zip(axes[0], swept.items(), strict=True):
                _against_key(axis, cells, values, key)
                axis.sharey(axes[0][0])
        else:
            across = len(ipcs) > 1
            figure, axes = panels(1, 1, (7, 4.2 if across else 0.34 * len(cells) + 1.1))
            if across:
                _against_ipc(axes[0][0], cells, ipcs)
            else:
                _by_row(axes[0][0], cells)
        axes[0][0].set_title(title)
        return _both(figure)


def diversity_picture(points: Mapping[str, Sequence[Point]], title: str) -> tuple[str, bytes]:
    """SVG and PNG of each row's points in the t-SNE plane; of several, their mean stands out."""
    with drawing():
        figure, ((axis,),) = panels(1, 1, (5.5, 4))
        for k, (row, found) in enumerate(points.items()):
            style: dict[str, Any] = {"marker": "os^Dv"[k % 5], "label": row}
            x, y = zip(*found, strict=True)
            if len(found) > 1:
                # hollow, for methods' points may coincide
                hollow = {"facecolors": "none", "edgecolors": f"C{k % 10}", "linewidths": 0.9}
                axis.scatter(x, y, s=22, marker=style["marker"], alpha=0.7, **hollow)
                style |= {"s": 80 - 12 * (k % 5), "edgecolors": "black", "zorder": 3}
                style["label"] = f"{row}, mean of {len(found)}"
            axis.scatter(fmean(x), fmean(y), color=f"C{k % 10}", **style)
        axis.set(xlabel="representativeness", ylabel="diversity", title=title)
        axis.legend(fontsize=7)
        return _both(figure)


def swept_diversity_picture(
    points: Mapping[str, Point], title: str, key: str, values: Mapping[str, float]
) -> tuple[str, bytes]:
    """SVG and PNG of both scores in the t-SNE plane against the key that rows vary."""
    found = sorted((values[row], *point) for row, point in points.items())
    x, representative, diverse = zip(*found, strict=True)
    with drawing():
        figure, ((axis,),) = panels(1, 1, (6.5, 4))
        axis.plot(x, diverse, "o-", label="diversity")
        axis.plot(x, representative, "s-", label="representativeness")
        axis.set(xlabel=key, title=title)
        axis.legend(fontsize=8)
        return _both(figure)


def _panel(row: EvalResult) -> str:
    return f"{row.dataset}, ipc {row.ipc}, {row.student}\n{row.protocol}"


def _sweep(
    axis: Axes, rows: Sequence[EvalResult], values: Mapping[str, Value], ticks: Sequence[Value]
) -> None:
    """One panel: a line per swept method over the ticks, the other methods as bands."""
    points = {}
    for method, variant in order_of((r.method, r.variant) for r in rows):
        mine = [r for r in rows if (r.method, r.variant) == (method, variant)]
        mean, low, _ = interval(units(scores_by_set(mine)))
        points[method, variant] = mean, mean - low
    level = {method: point for (method, variant), point in points.items() if variant is None}
    swept = order_of(method for method, variant in points if variant is not None)
    numbers = all(isinstance(v, float | int) for v in ticks)
    for k, method in enumerate(swept, len(level)):
        found = sorted(
            (ticks.index(values[v]), *p) for (m, v), p in points.items() if m == method and v
        )
        x, means, halves = zip(*found, strict=True)
        style: dict[str, Any] = {"color": "black"}
        if len(swept) > 1:
            style = {"color": f"C{k}", "label": method}
        axis.errorbar(x, means, yerr=halves, fmt="o-" if numbers else "o", capsize=3, **style)
    for k, (method, (mean, half)) in enumerate(level.items()):
        axis.axhline(mean, label=method, color=f"C{k}", linestyle="--")
        axis.axhspan(mean - half, mean + half, color=f"C{k}", alpha=0.12, linewidth=0)
    turned: dict[str, Any] = {} if numbers else {"rotation": 40, "ha": "right"}
    axis.set_xticks(range(len(ticks)), [str(v) for v in ticks], **turned)
    if level or len(swept) > 1:
        axis.legend()


def _against_ipc(axis: Axes, cells: Sequence[TableCell], ipcs: Sequence[int]) -> None:
    for k, row in enumerate(order_of(c.row for c in cells)):
        mine = sorted((c for c in cells if c.row == row), key=lambda c: int(c.ipc))
        shift = 0.02 * (k - 4)  # on the logarithmic axis, so that bars do not hide each other
        colour = f"C{k % 10}"
        ours = [(int(c.ipc) * (1 + shift), *score) for c in mine if (score := c.score("top1_best"))]
        paper = [(int(c.ipc) * (1 + shift), *c.paper) for c in mine if c.paper and c.comparable]
        if ours:
            x, y, half = zip(*ours, strict=True)
            axis.errorbar(
                x, y, yerr=[s or 0 for s in half], fmt="o-", color=colour, capsize=3, label=row
            )
        if paper:
            x, y, std = zip(*paper, strict=True)
            name = None if ours else f"{row} (paper alone)"
            hollow: dict[str, Any] = {"fmt": "o", "mfc": "none", "color": colour, "elinewidth": 0.7}
            axis.errorbar(x, y, yerr=[s or 0 for s in std], label=name, **hollow)
    axis.set_xscale("log")
    axis.set_xticks(ipcs, [str(i) for i in ipcs])
    axis.minorticks_off()
    axis.set(xlabel="images per class", ylabel="top-1, best test, %")
    axis.legend(fontsize=7, ncols=2)


def _against_key(
    axis: Axes, cells: Sequence[TableCell], values: Mapping[str, float], key: str
) -> None:
    """The swept rows side by side, in the table's order; the band is our least and most."""
    swept = [c for c in cells if c.row in values]
    seen = [(k, [r.top1_best for r in c.ours]) for k, c in enumerate(swept) if c.ours]
    if seen:
        lows, highs = ([limit(scores) for _, scores in seen] for limit in (min, max))
        axis.fill_between([k for k, _ in seen], lows, highs, color="black", alpha=0.12, linewidth=0)
    for label, colour, points, style in _ours_and_papers(swept, "o-"):
        at, mean, half = zip(*points, strict=True)
        axis.errorbar(at, mean, yerr=half, color=colour, label=label, **style)
    axis.set_xticks(range(len(swept)), [f"{values[c.row]:g}" for c in swept])
    axis.set(xlabel=key, ylabel="top-1, best test, %")
    axis.legend(fontsize=8)


def _by_row(axis: Axes, cells: Sequence[TableCell]) -> None:
    """Rows below one another, in the table's order."""
    for label, colour, points, style in _ours_and_papers(cells, "o"):
        at, mean, half = zip(*points, strict=True)
        axis.errorbar(mean, at, xerr=half, color=colour, label=label, **style)
    several = len({c.ipc for c in cells}) > 1
    names = [f"{c.row}, ipc {c.ipc}" if several else c.row for c in cells]
    axis.set_yticks(range(len(cells)), names)
    axis.invert_yaxis()
    axis.set_xlabel("top-1, best test, %")
    axis.legend(fontsize=8)


def _ours_and_papers(
    cells: Collection[TableCell], line: str
) -> list[tuple[str, str, list[tuple[int, float, float]], dict[str, Any]]]:
    """Label, colour, (position, mean, std) and style of what there is of both."""
    ours = [
        (k, score[0], score[1] or 0.0)
        for k, c in enumerate(cells)
        if (score := c.score("top1_best"))
    ]
    paper = [
        (k, c.paper[0], c.paper[1] or 0.0) for k, c in enumerate(cells) if c.paper and c.comparable
    ]
    found: list[tuple[str, str, list[tuple[int, float, float]], dict[str, Any]]] = [
        ("ours", "black", ours, {"fmt": line, "capsize": 3}),
        ("paper", "C1", paper, {"fmt": "o", "mfc": "none", "elinewidth": 0.7}),
    ]
    return [group for group in found if group[2]]


def _both(figure: Figure) -> tuple[str, bytes]:
    return as_svg(figure), as_png(figure, dpi=110)

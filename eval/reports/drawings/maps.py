"""The picture of planes: real and distilled images in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from eval.metrics.planes import Plane
from eval.reports.drawings.figures import as_png, as_svg, drawing, panels
from eval.reports.samples import MOST_CLASSES

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_FEW = 600  # real images: dots of fewer are drawn larger


def maps_picture(planes: Mapping[str, Plane]) -> tuple[str, bytes]:
    """SVG and PNG: a row of panels per plane, by its title, and a column per method.

    Real images are faint dots, the method's are crosses; one colour for each class, of which the
    first ten are drawn.
    """
    methods = list(next(iter(planes.values())).made)
    shape = len(planes), len(methods)
    with drawing("maps"):
        figure, rows = panels(*shape, (4 * shape[1], 4 * shape[0]), sharex="row", sharey="row")
        for axes, (title, plane) in zip(rows, planes.items(), strict=True):
            axes[0].set_ylabel(title)
            for axis, top, method in zip(axes, rows[0], methods, strict=True):
                _draw(axis, plane.real, plane.made[method])
                axis.set(xticks=[], yticks=[])
                top.set_title(method)
        return as_svg(figure, dpi=150), as_png(figure, dpi=90)


def _draw(axis: Axes, real: Sequence[Tensor], made: Sequence[Tensor]) -> None:
    few = sum(map(len, real)) < _FEW
    size, alpha = (14, 0.5) if few else (6, 0.25)
    for label, (dots, crosses) in enumerate(zip(real[:MOST_CLASSES], made, strict=False)):
        colour = f"C{label}"
        # as pixels: thousands of dots in every panel would make megabytes of paths
        axis.scatter(
            dots[:, 0],
            dots[:, 1],
            color=colour,
            s=size,
            alpha=alpha,
            linewidths=0,
            rasterized=True,
        )
        axis.scatter(
            crosses[:, 0],
            crosses[:, 1],
            color=colour,
            s=34,
            marker="X",
            edgecolors="black",
            linewidths=0.6,
            zorder=2,
        )

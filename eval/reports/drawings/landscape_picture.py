"""The picture of a landscape: where guidance gains, and in what."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from eval.reports.drawings.figures import as_png, as_svg, drawing, panels
from eval.results.landscape import Landscape
from eval.results.sweeps import Value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 2.6, 1.9  # inches of a panel


def landscape_picture(found: Landscape) -> tuple[str, bytes]:
    """SVG and PNG: a row of panels per measure, a column per value of the first key.

    Each field holds guided minus unguided, paired by seed; bold where its 95 % interval leaves
    zero out. Blue is more, red is less, as far as the row's largest.
    """
    columns = found.values(0)
    shape = len(found.measures), len(columns)
    with drawing("landscape"):
        figure, rows = panels(*shape, (_WIDTH * shape[1], _HEIGHT * shape[0] + 0.3))
        for axes, measure in zip(rows, found.measures, strict=True):
            most = max(abs(d.mean) for (_, name), d in found.gains.items() if name == measure)
            for axis, value in zip(axes, columns, strict=True):
                _draw(axis, found, measure, value, most or 1.0)
            axes[0].set_ylabel(_name(found.keys[2]))
        for axis in rows[-1]:
            axis.set_xlabel(_name(found.keys[1]))
        return as_svg(figure), as_png(figure, dpi=110)


def _draw(axis: Axes, found: Landscape, measure: str, value: Value, most: float) -> None:
    across, up = found.values(1), found.values(2)
    if (value, measure) not in found.plain:
        axis.set_title(f"{measure}\n{_name(found.keys[0])} {value}: –", fontsize=8)
        axis.axis("off")
        return
    mean, *_ = found.plain[value, measure]
    axis.set_title(f"{measure}\n{_name(found.keys[0])} {value}: unguided {mean:.3g}", fontsize=8)
    axis.set_xticks(range(len(across)), list(map(str, across)), fontsize=7)
    axis.set_yticks(range(len(up)), list(map(str, up)), fontsize=7)
    places = max(1, 1 - math.floor(math.log10(most)))  # two digits of the largest
    fields = [[float("nan")] * len(across) for _ in up]
    for row, of_up in enumerate(up):
        for column, of_across in enumerate(across):
            gain = found.gains.get(((value, of_across, of_up), measure))
            if gain is None:
                continue
            fields[row][column] = gain.mean
            sure = gain.low is not None and gain.high is not None and gain.low * gain.high > 0
            axis.text(
                column,
                row,
                f"{gain.mean:+.{places}f}",
                ha="center",
                va="center",
                fontsize=7,
                fontweight="bold" if sure else "normal",
            )
    axis.imshow(
        fields, cmap="RdBu", vmin=-1.5 * most, vmax=1.5 * most, aspect="auto", origin="lower"
    )


def _name(key: str) -> str:
    return {"guidance.scale": "λ", "guidance.stop_t": "t_stop", "sampler.cfg_scale": "CFG"}.get(
        key, key
    )

"""Pictures of samples on their way: what the network restores at some sampling steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.reports.figures import as_png, drawing, panels
from eval.reports.pictures import grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL = 0.75  # inches of one image


@dataclass(frozen=True, kw_only=True)
class Trail:
    """One image on its way, under several settings."""

    title: str
    columns: Sequence[str]  # what the columns are: sampling steps in the order of sampling
    rows: Mapping[str, Tensor]  # by setting: one image (3, H, W) uint8 per column, stacked
    guided: Mapping[str, int] = field(default_factory=dict)  # how many columns, of some settings


def steps_picture(trails: Sequence[Trail]) -> bytes:
    """A PNG: a panel per trail, a row per setting, a column per step.

    A red line stands right of a row's guided columns.
    """
    columns, rows = len(trails[0].columns), len(trails[0].rows)
    size = (len(trails) * (_CELL * columns + 0.9), _CELL * rows + 0.6)
    with drawing():
        figure, axes = panels(1, len(trails), size)
        for axis, trail in zip(axes[0], trails, strict=True):
            _draw(axis, trail)
        return as_png(figure, dpi=150)


def _draw(axis: Axes, trail: Trail) -> None:
    images = torch.cat(list(trail.rows.values()))
    height, width = images.shape[-2:]
    padding = max(1, width // 32)
    sheet = grid(images, len(trail.columns), pad_value=255, padding=padding)
    axis.imshow(sheet.permute(1, 2, 0).numpy())
    axis.autoscale(False)
    across, down = width + padding, height + padding
    middle_x, middle_y = padding + width / 2 - 0.5, padding + height / 2 - 0.5
    axis.set_xticks([middle_x + k * across for k in range(len(trail.columns))], trail.columns)
    axis.set_yticks([middle_y + k * down for k in range(len(trail.rows))], list(trail.rows))
    axis.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    axis.set_title(trail.title, fontsize=9)
    axis.spines[:].set_visible(False)
    for k, row in enumerate(trail.rows):
        if guided := trail.guided.get(row, 0):
            x = guided * across + padding / 2 - 0.5
            axis.plot([x, x], [k * down, (k + 1) * down], color="C3", linewidth=2)

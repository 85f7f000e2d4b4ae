"""Pictures of samples on their way: what the network restores at some sampling steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eval.reports.drawings.figures import as_png, drawing, panels
from eval.reports.drawings.pictures import grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL = 0.75  # inches of one image


@dataclass(frozen=True, kw_only=True)
class Trail:
    """One image on its way, under several settings."""

    title: str
    steps: Sequence[int]  # sampling steps in their order: the columns
    rows: Mapping[str, Tensor]  # by setting: x0_hat at these steps, decoded, (S, 3, H, W) uint8
    stops: Mapping[str, float] = field(default_factory=dict)  # t_stop of settings that have one
    modes: Mapping[str, Tensor] = field(default_factory=dict)  # of steered rows, (3, H, W) uint8


def steps_picture(trails: Sequence[Trail]) -> bytes:
    """A PNG: a panel per trail, a row per setting, a column per step, then the mode.

    Where a row has a t_stop, a red line stands right of its guided steps.
    """
    columns, rows = len(trails[0].steps) + bool(trails[0].modes), len(trails[0].rows)
    size = (len(trails) * (_CELL * columns + 0.9), _CELL * rows + 0.75)
    with drawing():
        figure, axes = panels(1, len(trails), size)
        for axis, trail in zip(axes[0], trails, strict=True):
            _draw(axis, trail)
        return as_png(figure, dpi=150)


def _draw(axis: Axes, trail: Trail) -> None:
    names, rows = [*map(str, trail.steps)], list(trail.rows.values())
    if trail.modes:
        names.append("mode")
        empty = torch.full_like(rows[0][0], 255)
        last = [trail.modes.get(row, empty) for row in trail.rows]
        rows = [torch.cat([row, mode[None]]) for row, mode in zip(rows, last, strict=True)]
    images = torch.cat(rows)
    height, width = images.shape[-2:]
    padding = max(1, width // 32)
    sheet = grid(images, len(names), pad_value=255, padding=padding)
    axis.imshow(sheet.permute(1, 2, 0).numpy())
    axis.autoscale(False)
    across, down = width + padding, height + padding
    middle_x, middle_y = padding + width / 2 - 0.5, padding + height / 2 - 0.5
    axis.set_xticks([middle_x + k * across for k in range(len(names))], names)
    axis.set_yticks([middle_y + k * down for k in range(len(rows))], list(trail.rows))
    axis.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    axis.set_title(f"{trail.title}: x̂₀ by sampling step", fontsize=9)
    axis.spines[:].set_visible(False)
    for k, row in enumerate(trail.rows):
        guided = sum(step > trail.stops[row] for step in trail.steps) if row in trail.stops else 0
        if guided:
            x = guided * across + padding / 2 - 0.5
            axis.plot([x, x], [k * down, (k + 1) * down], color="C3", linewidth=2)

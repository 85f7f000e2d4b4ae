"""The `paper_table` node of an experiment file: what a table of the paper compares and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

PLACES = ("dataset", "ipc", "seed")
POINTS = ("set", "class", "image")


@dataclass(frozen=True, kw_only=True)
class Denoising:
    """Which images of each row's first set are shown on their way, and at which sampling steps."""

    classes: Sequence[str]  # by name
    steps: Sequence[int]
    image: int = 0  # of each of these classes


@dataclass(frozen=True, kw_only=True)
class PaperTable:
    """The `paper_table` node of an experiment file; published values are percent, mean and std."""

    caption: str
    rows: Mapping[str, Mapping[str, Any]]  # overrides by row; `students` maps names to other ones
    grid: Mapping[str, Sequence[Any]]  # dataset, ipc, seed
    published: Mapping[str, Any] = field(default_factory=dict)  # row, dataset, ipc, student
    bands: Mapping[str, Any] = field(default_factory=dict)  # the same keys: [low, high]
    errata: Mapping[str, str] = field(default_factory=dict)  # by row; «table»: of the whole
    claims: Sequence[Mapping[str, Any]] = ()  # {more: row, than: row, by: points, dataset, ipc}
    mean_over_students: bool = False
    sweep: str | None = None  # the key that rows vary, for a curve
    measure: bool = False  # diversity and maps of the sets beside (or instead of) accuracy
    published_diversity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    points: str = "set"  # what a point of the picture of diversity is: a set, a class, an image
    maps: Sequence[str] = ()  # classes that get a map of their own where sets are measured
    denoising: Denoising | None = None  # images to be shown on their way

    def __post_init__(self) -> None:
        for key in self.grid:
            checks.choice("a key of paper_table.grid", key, PLACES)
        for key in PLACES:
            if not self.grid.get(key):
                raise UserError(f"paper_table.grid.{key} is missing; give a list")
        for part in (self.bands, self.errata):
            for row in part:
                checks.choice("a row of the table", row, [*self.rows, *self.published, "table"])
        checks.choice("paper_table.points", self.points, POINTS)
        for claim in self.claims:
            for side in ("more", "than"):
                checks.choice(f"paper_table.claims.{side}", claim[side], list(self.rows))


def read_table(node: Mapping[str, Any]) -> PaperTable:
    """The `paper_table` node, checked as far as a slip of the pen goes."""
    known = {f.name for f in fields(PaperTable)}
    for key in node:
        checks.choice("a key of paper_table", key, sorted(known))
    for key in ("caption", "rows", "grid"):
        if not node.get(key):
            raise UserError(f"paper_table.{key} is missing")
    for row, options in node["rows"].items():
        if not isinstance(options, dict):
            raise UserError(f"paper_table.rows.{row} must be a mapping, such as {{method: mgd3}}")
    for claim in node.get("claims", ()):
        if not {"more", "than"} <= set(claim):
            raise UserError(f"paper_table.claims: {claim} needs «more» and «than», each a row")
    denoising = node.get("denoising")
    return PaperTable(**{**node, "denoising": _read_denoising(denoising) if denoising else None})


def _read_denoising(node: Mapping[str, Any]) -> Denoising:
    known = [f.name for f in fields(Denoising)]
    for key in node:
        checks.choice("a key of paper_table.denoising", key, known)
    for key in ("classes", "steps"):
        if not isinstance(node.get(key), list) or not node[key]:
            raise UserError(f"paper_table.denoising.{key} is missing; give a list")
    for step in node["steps"]:
        checks.integer("paper_table.denoising.steps", step, minimum=0)
    checks.integer("paper_table.denoising.image", node.get("image", 0), minimum=0)
    return Denoising(**node)

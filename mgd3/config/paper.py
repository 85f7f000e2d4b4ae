"""The `paper_table` node of an experiment file: what a table of the paper compares and printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

PLACES = ("dataset", "ipc", "seed")
WHERE = "where"  # of a row: overrides at some of its places
_NO_OVERRIDES = (*PLACES, "students", WHERE)
_OF_A_ROW = ("seed", "students", WHERE, "backbone", "protocol")  # never of some of its places
TABLE = "table"  # in place of a row's name: the whole table

# Evaluators whose accuracies may stand in one column, and who reported under them. A protocol's
# YAML says of which family it is.
FAMILIES = {
    "hard_sgd": "hard labels, SGD lr 0.01: IDC, Minimax, MGD3, VLCP, ManifoldGD",
    "hard_adamw": "hard labels, AdamW lr 1e-3: IGD, DMGD, DAP, LGD",
    "hard_idc": "hard labels, SGD, from 100 classes on lr 0.1: IDC's own repository",
    "hard_aug": "hard labels, SGD lr 0.1, RandAugment: IMS3",
    "soft_rded": "a teacher asked for every batch, 300 epochs: RDED, MGD3, CaO2, IGD on 1K",
    "soft_500": "the same with 500 epochs: VLCP on 1K",
    "soft_d3": "the same with other batch sizes, every epoch after 290 tested: D3HR",
    "soft_fkd": "a teacher's stored answers: SRe2L, D4M",
    "unlisted": "an evaluator of the method's own that is not here",
}
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
    # Overrides by row; `students` maps names to other ones, `where` lists overrides at some places
    rows: Mapping[str, Mapping[str, Any]]
    grid: Mapping[str, Sequence[Any]]  # dataset, ipc, seed
    published: Mapping[str, Any] = field(default_factory=dict)  # row, dataset, ipc, student
    bands: Mapping[str, Any] = field(default_factory=dict)  # the same keys: [low, high]
    family: str | Mapping[str, str] | None = None  # of FAMILIES: of all published; or as errata
    errata: Mapping[str, str] = field(default_factory=dict)  # by row; «table»: of the whole
    claims: Sequence[Mapping[str, Any]] = ()  # {more: row, than: row, by: points, dataset, ipc}
    mean_over_students: bool = False
    sweep: str | Sequence[str] | None = None  # the key that rows vary, for a curve; or several
    measure: bool = False  # diversity and maps of the sets beside (or instead of) accuracy
    published_diversity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    points: str = "set"  # what a point of the picture of diversity is: a set, a class, an image
    maps: Sequence[str] = ()  # classes that get a map of their own where sets are measured
    denoising: Denoising | None = None  # images to be shown on their way
    rehearsal: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of the grid, in one

    @property
    def swept(self) -> dict[str, dict[str, float]]:
        """Of each key of the sweep its value in the rows that set it."""
        keys = [self.sweep] if isinstance(self.sweep, str) else self.sweep or ()
        rows = self.rows.items()
        return {key: {row: float(o[key]) for row, o in rows if key in o} for key in keys}

    def __post_init__(self) -> None:
        for key in self.grid:
            checks.choice("a key of paper_table.grid", key, PLACES)
        for key in self.rehearsal:
            checks.choice("a key of paper_table.rehearsal", key, PLACES)
        for key in PLACES:
            if not self.grid.get(key):
                raise UserError(f"paper_table.grid.{key} is missing; give a list")
        for part in (self.bands, self.errata, self._families):
            for row in part:
                checks.choice("a row of the table", row, [*self.rows, *self.published, TABLE])
        self._check_families()
        checks.choice("paper_table.points", self.points, POINTS)
        for claim in self.claims:
            for side in ("more", "than"):
                checks.choice(f"paper_table.claims.{side}", claim[side], list(self.rows))

    def overrides(self, row: str, dataset: Any, ipc: Any) -> dict[str, Any]:
        """What a row sets at one place: for all, then what its `where` says of such a place."""
        options = self.rows[row]
        found = {key: value for key, value in options.items() if key not in _NO_OVERRIDES}
        for case in options.get(WHERE, ()):
            if _fits(case.get("dataset"), dataset) and _fits(case.get("ipc"), ipc):
                found |= {key: value for key, value in case.items() if key not in PLACES}
        return found

    def varied(self) -> set[str]:
        """Keys that differ between the cells."""
        found = set(PLACES)
        for options in self.rows.values():
            found |= {*options, *(key for case in options.get(WHERE, ()) for key in case)}
        return found - {WHERE}

    @property
    def _families(self) -> Mapping[str, str]:
        if self.family is None:
            return {}
        return {TABLE: self.family} if isinstance(self.family, str) else self.family

    def family_of(self, row: str) -> str | None:
        """The evaluator family of a row's published accuracies; None where nothing is published."""
        return self._families.get(row, self._families.get(TABLE))

    def names_family(self, row: str) -> bool:
        """Has this row a family of its own?"""
        return row in self._families

    def _check_families(self) -> None:
        for row, family in self._families.items():
            where = "paper_table.family" + ("" if row == TABLE else f" of row {row}")
            checks.choice(where, family, FAMILIES)
        for row in self.published:
            if self.family_of(row) is None:
                raise UserError(
                    f"paper_table.published.{row} has no evaluator family, without which its "
                    "numbers compare with nothing: give paper_table.family, one for all rows or "
                    f"{{{row}: …}}; allowed: {', '.join(FAMILIES)}"
                )


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
    table = PaperTable(**{**node, "denoising": _read_denoising(denoising) if denoising else None})
    for row, options in table.rows.items():
        _check_cases(row, options, table)
    return table


def _fits(wanted: Any, value: Any) -> bool:
    """Is a place's value among those wanted? One alone needs no list, nothing wants all."""
    return wanted is None or str(value) in _texts(wanted)


def _texts(values: Any) -> list[str]:
    return [str(value) for value in (values if isinstance(values, list) else [values])]


def _check_cases(row: str, options: Mapping[str, Any], table: PaperTable) -> None:
    """Each of a row's `where` names places of the row, and something to set there."""
    where, cases = f"paper_table.rows.{row}.{WHERE}", options.get(WHERE, [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise UserError(f"{where} must list mappings, such as {{dataset: imagewoof, pool: 4}}")
    swept = [table.sweep] if isinstance(table.sweep, str) else table.sweep or ()
    for case in cases:
        places = [key for key in ("dataset", "ipc") if key in case]
        if not places or not set(case) - set(PLACES):
            raise UserError(
                f"{where}: {case} must name a dataset, an ipc or both, and what to set there"
            )
        for key in case:
            if key.split(".")[0] in _OF_A_ROW or key in swept:
                raise UserError(f"{where}: {key} is of a whole row; set it there")
        for key in places:
            known = [options[key]] if key in options else table.grid[key]
            for value in _texts(case[key]):
                checks.choice(f"{where}.{key}", value, _texts(known))


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

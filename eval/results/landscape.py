"""What guided sets gain over unguided ones, over three swept keys."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.results.layout import NONE, Layout
from eval.results.statistics import Difference, compare, interval, units
from eval.results.sweeps import Value, in_order_of_size
from mgd3.runtime.errors import UserError

Place = tuple[Value, Value, Value]  # values of three keys


@dataclass(frozen=True, kw_only=True)
class Point:
    """One distilled set."""

    place: Place
    plain: bool  # without guidance: what the others of its first key are held against
    seed: int | None
    measures: Mapping[str, float]  # by name


@dataclass(frozen=True, kw_only=True)
class Landscape:
    """What guided sets gain over unguided ones, by the values of three keys.

    A panel, that is a value of the first key, has a measure if all of its sets have it.
    """

    keys: tuple[str, str, str]  # a panel's, its horizontal and its vertical one
    measures: Sequence[str]
    plain: Mapping[tuple[Value, str], tuple[float, float, float]]  # mean and 95 % interval
    gains: Mapping[tuple[Place, str], Difference]
    sets: int  # fewest of any place

    def values(self, key: int) -> list[Value]:
        """Distinct values of one of the keys, in order."""
        return in_order_of_size([place[key] for place, _ in self.gains])

    def layout(self, title: str) -> Layout:
        """A line for each place."""
        names = [key.rpartition(".")[2] for key in self.keys]
        columns: dict[str, list[str]] = {name: [] for name in (*names, *self.measures)}
        for value in self.values(0):
            for name in names:
                columns[name].append(str(value) if name == names[0] else "unguided")
            for measure in self.measures:
                columns[measure].append(_text(self.plain.get((value, measure))))
            for place in sorted({p for p, _ in self.gains if p[0] == value}):
                for name, of_key in zip(names, place, strict=True):
                    columns[name].append(str(of_key))
                for measure in self.measures:
                    gain = self.gains.get((place, measure))
                    columns[measure].append(NONE if gain is None else gain.text(2))
        return Layout.of_columns(f"{title}: unguided, and guided minus unguided", columns)


def _text(found: tuple[float, float, float] | None) -> str:
    """A mean and its interval; one value has none."""
    if found is None:
        return NONE
    mean, low, high = found
    return f"{mean:.2f}" if low == high else f"{mean:.2f} [{low:.2f}, {high:.2f}]"


def landscape(points: Sequence[Point], keys: tuple[str, str, str]) -> Landscape:
    """Measures at every place; `UserError` where there is nothing to hold a set against."""
    by_place: dict[Place, list[Point]] = defaultdict(list)
    plain: dict[Value, list[Point]] = defaultdict(list)
    for point in points:
        if point.plain:
            plain[point.place[0]].append(point)
        else:
            by_place[point.place].append(point)
    if lonely := sorted({str(place[0]) for place in by_place if place[0] not in plain}):
        raise UserError(
            f"no unguided sets with {keys[0]}={', '.join(lonely)} to compare with: make them with "
            "the same keys and guidance.scale=0, or method=unguided"
        )
    if not by_place:
        raise UserError("there are no guided sets to draw")
    for place, found in by_place.items():
        if len({point.seed for point in found}) < len(found):
            where = ", ".join(f"{k}={v}" for k, v in zip(keys, place, strict=True))
            raise UserError(
                f"several sets of one seed at {where}: they differ in more than by={list(keys)}; "
                "name a folder with one kind of them"
            )

    panels = {value: [p for p in points if p.place[0] == value] for value in plain}
    had = {
        value: [m for m in of_it[0].measures if all(m in p.measures for p in of_it)]
        for value, of_it in panels.items()
    }
    most_first = sorted(had.values(), key=len, reverse=True)

    def scores(found: Sequence[Point], measure: str) -> dict[int | None, list[float]]:
        by_seed: dict[int | None, list[float]] = defaultdict(list)
        for point in found:  # unguided ones of a seed may be there under several names
            by_seed[point.seed].append(point.measures[measure])
        return by_seed

    def mean(found: Sequence[Point], measure: str) -> tuple[float, float, float]:
        return interval(units(scores(found, measure)))

    return Landscape(
        keys=keys,
        measures=list(dict.fromkeys(m for of_panel in most_first for m in of_panel)),
        plain={(value, m): mean(found, m) for value, found in plain.items() for m in had[value]},
        gains={
            (place, m): compare(scores(found, m), scores(plain[place[0]], m))
            for place, found in by_place.items()
            for m in had[place[0]]
        },
        sets=min(map(len, [*by_place.values(), *plain.values()])),
    )

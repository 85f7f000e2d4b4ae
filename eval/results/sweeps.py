"""One key's values side by side: the rows of a sweep, told apart by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.results.rows import EvalResult, read_results
from mgd3.data.distilled import MANIFEST, DistilledDataset
from mgd3.runtime.errors import UserError

Value = str | float


def rows_by(folder: Path, key: str) -> tuple[list[EvalResult], dict[str, Value]]:
    """All rows below `folder`, and the value of `key` by variant.

    Rows of a method that ran with several values get the variant «key=value», those of one with a
    single value stay as they are. `key` is a group (its choice is the value) or a dotted option of
    one. Raises `UserError` if no method has several values.
    """
    found: dict[str, set[Value]] = defaultdict(set)
    pairs: list[tuple[EvalResult, Value | None]] = []
    for row, manifest in _with_manifests(folder):
        value = row.protocol if key == "protocol" else value_of(manifest, key)
        pairs.append((row, value))
        if value is not None:
            found[row.method].add(value)
    several = {method for method, values in found.items() if len(values) > 1}
    if not several:
        raise UserError(
            f"by={key}: no method below {folder} ran with more than one value; give a group such "
            "as modes, or an option such as guidance.scale"
        )
    rows, values = [], {}
    for row, value in pairs:
        if row.method in several and value is not None:
            variant = f"{key.split('.')[-1]}={value}"
            row, values[variant] = replace(row, variant=variant), value
        rows.append(row)
    order = {value: k for k, value in enumerate(in_order_of_size(values.values()))}
    rows.sort(key=lambda r: order[values[r.variant]] if r.variant else -1)
    return rows, values


def value_of(manifest: Mapping[str, Any], key: str) -> Value | None:
    """A group's choice, or the value of a key or option; None where a set's manifest has none."""
    # sets that were made before identities have their choices alone
    named = (manifest.get("identity") or manifest.get("choices") or {}).get(key)
    value = named.get("choice") if isinstance(named, Mapping) else named
    if value is None:
        value = _looked_up(manifest["config"], key)
    return value if isinstance(value, str | float | int) else None


def _looked_up(values: Any, key: str) -> Any:
    """The value of a dotted key, whose later dots may stand in names."""
    if not isinstance(values, Mapping) or key in values:
        return values.get(key) if isinstance(values, Mapping) else None
    first, _, rest = key.partition(".")
    return _looked_up(values.get(first), rest) if rest else None


def in_order_of_size(values: Collection[Value]) -> list[Value]:
    """Distinct values: numbers by size, then names."""
    return sorted(set(values), key=lambda v: (isinstance(v, str), v))


def _with_manifests(folder: Path) -> list[tuple[EvalResult, dict[str, Any]]]:
    """Each row with the manifest of the set that it was trained on."""
    manifests: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.rglob("results.jsonl")):
        nearest = next((p for p in path.parents if (p / MANIFEST).is_file()), None)
        if nearest is None:
            raise UserError(f"{path} belongs to no distilled dataset: no {MANIFEST} above it")
        manifest = DistilledDataset(nearest).manifest
        manifests |= {row.key: manifest for row in read_results(path.parent)}
    return [(row, manifests[row.key]) for row in read_results(folder)]

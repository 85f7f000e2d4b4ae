"""Rows of a sweep side by side: told apart by the values of keys that the sweep varied."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.results.rows import EvalResult, read_results
from mgd3.data.claims import OF_SCORES
from mgd3.data.distilled import MANIFEST, DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.storage.documents import read_document
from mgd3.storage.unsaid import UNSAID

Value = str | float
Values = tuple[Value | None, ...]  # of some keys, in their order; None: the method has no such key

PROTOCOL = "protocol"  # it, its options and the students' precision are the scores', not the set's
TRAINING_PRECISION = "training_precision"
AS_THE_PROTOCOL = "as the protocol"  # an option that a run left as its protocol has it


def keys_of(by: str | Sequence[str] | None) -> list[str]:
    """`by=KEY` or `by=[KEY,…]` as a list; `UserError` for what is neither, or a key twice."""
    keys = [by] if isinstance(by, str) else list(by or ())
    keys = [key.removeprefix("compute.") if isinstance(key, str) else key for key in keys]
    if not all(isinstance(key, str) and key for key in keys) or len(set(keys)) < len(keys):
        raise UserError(f"by={by!r}: give a key or a list of them, such as by=[modes,guidance]")
    return keys


def rows_by(
    rows: Sequence[EvalResult], folders: Sequence[Path], keys: Sequence[str]
) -> tuple[list[EvalResult], dict[str, Values]]:
    """The rows below `folders` as variants «key=value …», and the values of `keys` by variant.

    A variant names the keys of which a method ran with several values; a method that ran with one
    value of each stays as it is. A key is a group (its choice is the value), a dotted option of
    one, `precision`, or of the students `protocol`, `training_precision`, `protocol.epochs` and
    the like. Raises `UserError` as `variants` does.
    """
    origins: dict[tuple, tuple[Mapping[str, Any], Path]] = {}
    for folder in folders:
        origins |= _origins(folder)
    values = [tuple(_value(row, *origins[row.key], key) for key in keys) for row in rows]
    names = variants([r.method for r in rows], values, keys)
    found = [replace(r, variant=name) for r, name in zip(rows, names, strict=True)]
    by_variant = {n: v for n, v in zip(names, values, strict=True) if n is not None}
    places = [p if n else [] for n, p in zip(names, places_of(values), strict=True)]
    ordered = sorted(range(len(found)), key=places.__getitem__)
    return [found[k] for k in ordered], by_variant


def places_of(values: Sequence[Values]) -> list[list[int]]:
    """What runs are sorted by: of each key the place of the run's value, by size; -1 for none."""
    orders = [
        in_order_of_size([v for v in of_key if v is not None])
        for of_key in zip(*values, strict=True)
    ]
    return [
        [-1 if v is None else order.index(v) for order, v in zip(orders, mine, strict=True)]
        for mine in values
    ]


def variants(
    methods: Sequence[str], values: Sequence[Values], keys: Sequence[str]
) -> list[str | None]:
    """What tells each of some runs from others of its method: «key=value …», or None.

    `values` are those of `keys`, a tuple for each run. Raises `UserError` for a key that no run
    has, and where no method has several values of any.
    """
    seen: dict[str, list[set[Value]]] = defaultdict(lambda: [set() for _ in keys])
    for method, mine in zip(methods, values, strict=True):
        for k, value in enumerate(mine):
            seen[method][k] |= set() if value is None else {value}
    for k, key in enumerate(keys):
        if not any(sets[k] for sets in seen.values()):
            raise UserError(f"by={key}: no run has such a key; {_HINT}")
    if keys and all(len(of_key) < 2 for sets in seen.values() for of_key in sets):
        raise UserError(
            f"by={','.join(keys)}: no method ran with more than one value of it; {_HINT}"
        )
    short = [key.rpartition(".")[2] for key in keys]
    shown = [s if short.count(s) == 1 else key for s, key in zip(short, keys, strict=True)]
    found = []
    for method, mine in zip(methods, values, strict=True):
        parts = [
            f"{name}={value}"
            for name, value, of_key in zip(shown, mine, seen[method], strict=True)
            if value is not None and len(of_key) > 1
        ]
        found.append(" ".join(parts) or None)
    return found


_HINT = "give a group such as modes, or an option such as guidance.scale"


def value_of(manifest: Mapping[str, Any], key: str) -> Value | None:
    """A group's choice, or the value of a key or option; None where a set's manifest has none."""
    # sets that were made before identities have their choices alone
    named = (manifest.get("identity") or manifest.get("choices") or {}).get(key)
    value = named.get("choice") if isinstance(named, Mapping) else named
    if value is None:
        value = _looked_up(manifest["config"], key)
    if value is None and manifest.get("identity"):
        value = UNSAID.get(key)
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


def _value(row: EvalResult, manifest: Mapping[str, Any], scores: Path, key: str) -> Value | None:
    """What `key` was for the row: of its set's manifest, or of the folder of its scores."""
    if key == PROTOCOL:
        return row.protocol
    of_protocol = key.startswith(f"{PROTOCOL}.")
    if not of_protocol and key != TRAINING_PRECISION:
        return value_of(manifest, key)
    path = scores / OF_SCORES
    if not path.is_file():  # scores of before there were such
        return None
    identity = read_document(path, dict[str, Any], _REMEDY).get("identity") or {}
    if not of_protocol:
        return identity.get(key)
    changed = (identity.get(PROTOCOL) or {}).get("values") or {}
    value = changed.get(key.removeprefix(f"{PROTOCOL}."), AS_THE_PROTOCOL)
    return value if isinstance(value, str | int | float) else json.dumps(value)


_REMEDY = "score the set anew with scripts/evaluate.py, or move the folder away"


def _origins(folder: Path) -> dict[tuple, tuple[Mapping[str, Any], Path]]:
    """By each row's key the manifest of the set that its student learned, and its own folder."""
    origins: dict[tuple, tuple[Mapping[str, Any], Path]] = {}
    for path in sorted(folder.rglob("results.jsonl")):
        nearest = next((p for p in path.parents if (p / MANIFEST).is_file()), None)
        if nearest is None:
            raise UserError(f"{path} belongs to no distilled dataset: no {MANIFEST} above it")
        manifest = DistilledDataset(nearest).manifest
        origins |= {row.key: (manifest, path.parent) for row in read_results(path.parent)}
    return origins

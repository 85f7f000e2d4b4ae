"""Nested options: a mapping of the YAML becomes the dataclass that checks its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

T = TypeVar("T")
_LARGEST_IMAGE = 4096  # pixels: 50 MB decoded, and no published student sees more than 512


def options(kind: type[T], key: str, values: object, /, **own: Any) -> T:
    """The dataclass of a mapping, lists as tuples; `own` fields come from elsewhere.

    Raises `UserError` for an option that the dataclass does not have, and for one left out.
    """
    allowed = [f.name for f in fields(kind) if f.name not in own]  # type: ignore[arg-type]
    if not isinstance(values, Mapping):
        raise UserError(f"{key}={values!r} must be a mapping of {', '.join(allowed)}")
    for option in values:
        checks.choice(f"an option of {key}", option, allowed)
    for option in allowed:
        if option not in values:
            raise UserError(f"{key}.{option} is not set; give it as {key}.{option}=VALUE")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**given, **own)


def check_interval(key: str, value: object, positive: bool = False) -> None:
    """`UserError` naming `key` unless the value is a pair (low, high), 0 or more, or above 0."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise UserError(f"{key}={value!r} must be [low, high]")
    low, high = (checks.number(key, v, minimum=0) for v in value)
    if low > high or (positive and low == 0):
        above = ", both above 0" if positive else ""
        raise UserError(f"{key}={list(value)} must be [low, high]{above}")


def pairs(key: str, rows: object, columns: str, example: str) -> list[tuple[Any, Any]]:
    """A table of two columns as pairs, their values unchecked.

    Raises `UserError` that names the `columns`, with an `example` to type.
    """
    table = []
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, list) or len(row) != 2:
            raise UserError(
                f"{key}: {row!r} must be a pair [{columns}], in a list of "
                f"such pairs; write {key}={example}"
            )
        table.append((row[0], row[1]))
    return table


def check_image_size(value: object) -> int:
    """Pixels a side: enough for a network to see, and no more than a decoded set can hold."""
    return checks.integer("protocol.image_size", value, minimum=4, maximum=_LARGEST_IMAGE)


def check_image_weights(value: object) -> str:
    """How each training image counts: all alike, or by the mass of its mode."""
    return checks.choice("protocol.image_weights", value, ["none", "mass"])

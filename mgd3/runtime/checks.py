"""Checks of values that a user sets: each failure names the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence

from mgd3.runtime.errors import UserError
from mgd3.runtime.text import is_printable


def number(
    key: str, value: object, minimum: float | None = None, maximum: float | None = None
) -> float:
    """`value` as a finite float within [minimum, maximum], else `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{key}={value!r} is not a number; {_allowed(minimum, maximum)}")
    if (minimum is not None and value < minimum) or (maximum is not None and value > maximum):
        raise UserError(f"{key}={value} is out of range; {_allowed(minimum, maximum)}")
    return float(value)


def integer(key: str, value: object, minimum: int | None = None, maximum: int | None = None) -> int:
    """`value` as an int within [minimum, maximum], else `UserError`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UserError(f"{key}={value!r} is not an integer; {_allowed(minimum, maximum)}")
    return int(number(key, value, minimum, maximum))


def flag(key: str, value: object) -> bool:
    """`value` if it is true or false, else `UserError`."""
    if not isinstance(value, bool):
        raise UserError(f"{key}={value!r} must be true or false")
    return value


_NAME = re.compile(r"(?!\.{1,2}$)[^/\\]{1,100}")


def is_name(value: str) -> bool:
    """May a file or folder be called so, and nothing outside its own place be meant by it?"""
    return _NAME.fullmatch(value) is not None and is_printable(value)


def name(key: str, value: object) -> str:
    """`value` if a file or folder may be called so, else `UserError`."""
    if not isinstance(value, str) or not is_name(value):
        raise UserError(
            f"{key}={value!r} is no name; allowed: 1 to 100 characters, none of them a slash or a "
            "control character, and not . or .."
        )
    return value


def choice(key: str, value: object, options: Iterable[str]) -> str:
    """`value` if it is one of `options`, else `UserError` with the closest one."""
    options = list(options)
    if value not in options:
        raise unknown(key, repr(value), options)
    return str(value)


def unknown(key: str, shown: str, options: Sequence[str]) -> UserError:
    """That a value, as it is `shown`, is none of the options: with the closest, and all of them."""
    close = difflib.get_close_matches(shown.strip("'"), options, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return UserError(f"{key}={shown} is unknown.{hint} Allowed: {', '.join(options)}")


def _allowed(minimum: float | None, maximum: float | None) -> str:
    if minimum is None and maximum is None:
        return "allowed: any number"
    if maximum is None:
        return f"allowed: >= {minimum}"
    return f"allowed: {minimum}..{maximum}" if minimum is not None else f"allowed: <= {maximum}"

"""JSON that a user can replace: checked against a description of its shape before it is used."""

from __future__ import annotations

import json
import logging
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from mgd3.runtime.checks import is_name
from mgd3.runtime.errors import UserError, reading
from mgd3.storage.files import read_file

log = logging.getLogger(__name__)


def _a_name(value: str) -> str:
    if not is_name(value):
        raise ValueError(
            "is no name: at most 100 characters, none of them a slash or a control character"
        )
    return value


Name = Annotated[str, AfterValidator(_a_name)]  # a folder may be called so
Number = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def read_document(path: Path, shape: Any, remedy: str) -> Any:
    """The JSON in `path` as it stands, once it fits `shape` (a type that pydantic knows).

    Raises `FileNotFoundError`, and `UserError` naming the first entry that does not fit.
    """
    with reading(path, remedy):
        text = read_file(path)
    fitting(text, shape, str(path), remedy)
    return json.loads(text)


def fitting(text: bytes | str, shape: Any, place: str, remedy: str) -> Any:
    """JSON made into a `shape`; `UserError` for `place` where it does not fit."""
    try:
        return _adapter(shape).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        if first["type"] == "json_invalid":
            raise UserError(f"{place} is no JSON ({first['msg']}); {remedy}") from None
        where = ".".join(map(str, first["loc"])) or "its content"
        absent = first["type"] in ("missing", "missing_argument")
        found = "is missing" if absent else f"is {_short(first['input'])}: {_plain(first['msg'])}"
        raise UserError(f"{place}: {where} {found}; {remedy}") from None


def remembered(path: Path, shape: Any) -> Any:
    """What a file of ours remembers; an empty `shape` if it is not there or not of that shape."""
    try:
        with reading(path, "it is forgotten"):
            return fitting(read_file(path), shape, str(path), "it is forgotten")
    except UserError as error:
        log.warning("%s", error)
    except FileNotFoundError:
        pass
    return _adapter(shape).validate_python({})


@cache
def _adapter(shape: Any) -> TypeAdapter:
    return TypeAdapter(shape)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} …"


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]

"""What is made once and found again: latents, modes, weights, teachers, labels, pixels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from mgd3.runtime.errors import CorruptFileError
from mgd3.storage.files import waiting
from mgd3.storage.tensors import load_tensors, save_tensors

log = logging.getLogger(__name__)
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Format(Protocol[T_co]):
    """How one kind of thing lies in a file; `key` says what it was made from."""

    def read(self, path: Path, key: Mapping[str, str]) -> T_co:
        """Raises `FileNotFoundError`, or `CorruptFileError` for damage and for another key."""

    def write(self, path: Path, value: Any, key: Mapping[str, str]) -> T_co:
        """Write whole or not at all; what a reader would get."""


class TensorFile:
    """Tensors by name in one safetensors file, the key in its metadata."""

    def read(self, path: Path, key: Mapping[str, str]) -> dict[str, Tensor]:
        """Tensors whose bytes and key are those that were written."""
        return load_tensors(path, dict(key))

    def write(
        self, path: Path, value: dict[str, Tensor], key: Mapping[str, str]
    ) -> dict[str, Tensor]:
        """`value` itself."""
        save_tensors(path, value, dict(key))
        return value


TENSORS = TensorFile()


def cached(
    path: Path,
    key: Mapping[str, str],
    make: Callable[[], Any],
    format: Format[T] = TENSORS,  # type: ignore[assignment]  # noqa: A002
    lock: str | None = None,
) -> T:
    """What lies in `path` and was made from `key`; else `make()`, written there for the next one.

    Reading takes no lock and needs no permission to write. Whoever makes it holds a lock beside
    the file (`lock` names one that several files share), so that several runs make it once. A
    damaged file is made again, and said so.
    """
    value = found(path, key, format)
    if value is not None:
        return value
    with waiting(path.parent, path.stem if lock is None else lock):
        value = found(path, key, format)
        if value is None:
            value = format.write(path, make(), key)
    return value


def found(
    path: Path,
    key: Mapping[str, str],
    format: Format[T] = TENSORS,  # type: ignore[assignment]  # noqa: A002
) -> T | None:
    """What lies in `path`; None if there is nothing, or nothing whole of this key."""
    try:
        return format.read(path, key)
    except FileNotFoundError:
        return None
    except CorruptFileError as error:
        log.warning("%s; making it again", error)
        return None

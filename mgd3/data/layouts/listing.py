"""Which files of a folder are pictures, and what is left out: counted, never silently."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mgd3.data.decoding import suffixes
from mgd3.runtime.errors import UserError, first_line

# What operating systems and storage boxes put beside pictures
_OF_MACHINES = ("@eadir", "__macosx", "thumbs.db", "desktop.ini", ".ds_store")


@dataclass(frozen=True)
class Listing:
    """Pictures below a folder by their paths within it, in lexicographic order."""

    files: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)  # files by reason


def list_pictures(folder: Path, deep: bool = True) -> Listing:
    """Every picture in `folder` and, if `deep`, below it; none in a folder that is not there."""
    known = suffixes()
    files, left_out = [], Counter[str]()
    for path, name in _walk(folder, "", deep):
        require_utf8(folder, path)
        reason = _reason(name, known)
        if reason is None:
            files.append(path)
        else:
            left_out[reason] += 1
    return Listing(tuple(sorted(files)), dict(left_out))


def _walk(folder: Path, prefix: str, deep: bool) -> Iterator[tuple[str, str]]:
    """Paths within the folder, and names, of all files; folders of machines count as one file."""
    for name, is_folder in entries(folder / prefix):
        path = f"{prefix}{name}"
        if is_folder and not is_of_machines(name):
            if deep:
                yield from _walk(folder, f"{path}/", deep)
        else:
            yield path, name


def entries(folder: Path) -> list[tuple[str, bool]]:
    """Names in a folder, and which are folders; none where there is no folder.

    Raises `UserError` where the file system refuses, as where links lead in a circle.
    """
    try:
        with os.scandir(folder) as found:
            return [(entry.name, entry.is_dir()) for entry in found]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(
            f"{folder} cannot be listed ({first_line(error)}); mend it or take it out"
        ) from error


def require_utf8(folder: Path, path: str) -> None:
    """`UserError` for bytes that Python could only smuggle into a text."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = path.encode(errors="replace").decode()
        raise UserError(
            f"{folder}/{shown}: the name is no UTF-8; rename the file or folder"
        ) from error


def is_of_machines(name: str) -> bool:
    """Is it hidden, or put there by an operating system?"""
    return name.startswith(".") or name.lower() in _OF_MACHINES


def is_picture(name: str) -> bool:
    """Would a listing take a file of this name?"""
    return _reason(name, suffixes()) is None


def _reason(name: str, known: frozenset[str]) -> str | None:
    """Why a file is left out; None for a picture."""
    if name.lower() in _OF_MACHINES:
        return "of the operating system"
    if name.startswith("."):
        return "hidden"
    suffix = Path(name).suffix.lower()
    return None if suffix in known else f"not pictures ({suffix or 'no suffix'})"


def counted(left_out: Mapping[str, int]) -> str:
    """«5 files not pictures (.txt), 3 hidden»."""
    return ", ".join(
        f"{count} {'file' if count == 1 else 'files'} {reason}"
        for reason, count in sorted(left_out.items())
    )

"""Which files of a folder are pictures, and what is left out: counted, never silently."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mgd3.data.decoding import suffixes
from mgd3.runtime.errors import UserError

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
        if not _is_utf8(path):
            shown = path.encode(errors="replace").decode()
            raise UserError(f"{folder}/{shown}: the name is no UTF-8; rename the file or folder")
        reason = _reason(name, known)
        if reason is None:
            files.append(path)
        else:
            left_out[reason] += 1
    return Listing(tuple(sorted(files)), dict(left_out))


def _walk(folder: Path, prefix: str, deep: bool) -> Iterator[tuple[str, str]]:
    """Paths within the folder, and names, of all files; folders of machines count as one file."""
    try:
        entries = list(os.scandir(folder / prefix))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        path = f"{prefix}{entry.name}"
        if entry.is_dir() and not is_of_machines(entry.name):
            if deep:
                yield from _walk(folder, f"{path}/", deep)
        else:
            yield path, entry.name


def _is_utf8(name: str) -> bool:
    """False for bytes that Python could only smuggle into a text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_of_machines(name: str) -> bool:
    """Is it hidden, or put there by an operating system?"""
    return name.startswith(".") or name.lower() in _OF_MACHINES


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

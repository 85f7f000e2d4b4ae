"""What classes there are: the benchmarks' lists, and a user's own table of names."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.text import is_printable

_CLASS_LISTS = Path(__file__).parent / "classes"


@dataclass(frozen=True)
class ClassInfo:
    """One class: its key, a human name, and ImageNet's index if it is one of the 1000."""

    wnid: str
    name: str
    imagenet_id: int | None = None


def read_class_list(name: str) -> tuple[ClassInfo, ...]:
    """A built-in list, rows `wnid<TAB>ImageNet index<TAB>name`, in the benchmark's order."""
    names = sorted(p.stem for p in _CLASS_LISTS.glob("*.txt"))
    path = _CLASS_LISTS / f"{checks.choice('dataset.class_list', name, names)}.txt"
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return tuple(ClassInfo(wnid, title, int(index)) for wnid, index, title in rows)


def read_names(path: Path) -> dict[str, str]:
    """Class names by folder from a CSV file with the columns folder and name; none without it."""
    if not path.exists():
        return {}
    if not path.is_file():
        raise UserError(f"{path} is no file: move it away, or put a table there")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 table ({error}): save it as CSV UTF-8") from error
    if not rows or not {"folder", "name"} <= rows[0].keys():
        raise UserError(f"{path} must have a first line «folder,name» and one line per class")
    names: dict[str, str] = {}
    for line, row in enumerate(rows, start=2):
        if None in row:  # DictReader's key for what has no column
            raise UserError(
                f'{path}, line {line}, has a comma too many: write the name in quotes, "…, …"'
            )
        folder, name = (row["folder"] or "").strip(), (row["name"] or "").strip()
        printable = is_printable(folder) and is_printable(name)
        if not folder or not name or folder in names or not printable:
            reason = "names a folder twice" if folder in names else "lacks a folder or a name"
            reason = reason if printable else "holds a line break or a control character"
            raise UserError(f"{path}, line {line}, {reason}: {folder!r}, {name!r}")
        names[folder] = name
    return names

"""Captions of real images: a file of the user's, as `datasets`' imagefolder reads it.

JSON Lines: one object a line, {"file_name": "cat/0.png", "text": "a cat on a chair"}; file_name is
the image's path below the training folder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from pydantic import BaseModel

from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.runtime.errors import UserError, reading
from mgd3.storage.documents import fitting
from mgd3.storage.files import read_file

log = logging.getLogger(__name__)

_REMEDY = 'each line must be an object such as {"file_name": "cat/0.png", "text": "a cat"}'


class _Line(BaseModel):
    file_name: str
    text: str


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name, without white space around them; `UserError` for any other file."""
    try:
        with reading(path, "save it as UTF-8"):
            text = read_file(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"prompts.captions={path}: there is no such file") from error
    found: dict[str, str] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = fitting(line, _Line, f"{path}, line {number}", _REMEDY)
        name = str(PurePosixPath(row.file_name))
        if name in found:
            raise UserError(f"{path}, line {number}, is a second caption of {name}; leave one out")
        found[name] = row.text.strip()
    return found


def captions_of(
    path: Path, dataset: RealDataset, inventory: Sequence[ClassImages]
) -> list[list[str]]:
    """The captions of each class's images, in the inventory's order.

    Raises `UserError` where an image has none, or an empty one; warns of captions of no image.
    """
    captions = read_captions(path)
    names = [[_name(image.key) for image in images.images] for images in inventory]
    every = [name for of_class in names for name in of_class]
    _refuse(path, "no caption", [name for name in every if name not in captions], every, captions)
    _refuse(path, "an empty caption", [n for n in every if not captions[n]], every, captions)
    known, wnids = set(every), {info.wnid for info in dataset.classes}
    spare = [n for n in captions if n not in known and n.partition("/")[0] in wnids]
    if spare:
        log.warning(
            "%s: %d captions are of no training image of dataset=%s, the first of %s; they are "
            "left out",
            *(path, len(spare), dataset.name, spare[0]),
        )
    return [[captions[name] for name in of_class] for of_class in names]


def _name(key: str) -> str:
    """An image's path below the training folder."""
    return key.removeprefix("train/")


def _refuse(
    path: Path, what: str, those: Sequence[str], every: Sequence[str], captions: Mapping[str, str]
) -> None:
    if not those:
        return
    named = next(iter(captions), None)
    example = f" (the file's first name is {named})" if named and named not in every else ""
    raise UserError(
        f"prompts.captions={path} has {what} for {len(those)} of {len(every)} training images, the "
        f"first is {those[0]}{example}; every training image needs one, by its path below the "
        "training folder"
    )

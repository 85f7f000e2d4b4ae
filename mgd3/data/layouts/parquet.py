"""Images in parquet tables, as on the Hugging Face hub: wanted classes are unpacked to folders.

A picture in a table can only be had by reading what lies before it, so these are not read in place
as files are: the classes that a run wants are written once, byte for byte, to class folders.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from mgd3.data.class_lists import ClassInfo, read_class_list
from mgd3.data.decoding import suffixes
from mgd3.data.layouts.archives import require_space
from mgd3.data.layouts.listing import is_of_machines, is_picture
from mgd3.data.layouts.shards import Tables, name_of, of_folder, of_hub, source_of
from mgd3.data.layouts.trees import TRAIN, VAL
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError, reading
from mgd3.runtime.progress import progress
from mgd3.storage.documents import remembered
from mgd3.storage.files import remove_leftovers, waiting, write_atomic, write_json, writing
from mgd3.storage.repositories import HUB

log = logging.getLogger(__name__)

_IMAGENET_NAME = re.compile(r"(n\d{8})_\d+|ILSVRC2012_val_\d{8}_(n\d{8})")
_ALL = ".all"  # beside the class folders: every class was unpacked
_JOURNAL = "done.json"
_IMAGENET_CLASSES, _AGREE = 1000, 900
_NAMED = 5
_LONGEST_NAME = 150  # bytes: a shard's name and more still go before it


def unpacked(root: str, classes: Sequence[ClassInfo] | None, data: Path) -> Path:
    """The folder with train/<class>/* and val/<class>/* of a source; None takes all its classes.

    What is not there yet is unpacked now; a killed unpacking goes on with the next shard. Raises
    `UserError` for tables without images or class labels, for classes that they have not, and for
    what the hub refuses.
    """
    source = source_of(root) if root.startswith(HUB) else None
    # labels' own names are other folders than a class list's: the two never lie together
    place = data / "tables" / (name_of(root) + ("+labels" if classes is None else ""))
    if _missing(classes, place) == []:  # as in a folder that others filled, where none may write
        return place
    with waiting(place):
        missing = _missing(classes, place)
        if missing != []:
            tables = of_hub(root, source, place) if source else of_folder(root)
            _unpack(tables, missing, place)
    return place


def _missing(classes: Sequence[ClassInfo] | None, place: Path) -> list[ClassInfo] | None:
    """Wanted classes that are not unpacked; None for all."""
    if (place / _ALL).is_file():
        return []
    return None if classes is None else [c for c in classes if not _has(place, c.wnid)]


def _has(place: Path, wnid: str) -> bool:
    return all((place / split / wnid).is_dir() for split in (TRAIN, VAL))


def _unpack(tables: Tables, classes: Sequence[ClassInfo] | None, place: Path) -> None:
    """Write the wanted classes' images aside, then move all their folders into place."""
    part = place / ".part"
    sizes = [file.size for _, file in tables.shards]
    log.info("%s: %d tables, %.2f GB to read", tables.name, len(sizes), sum(sizes) / 1e9)
    smallest = min((file for _, file in tables.shards), key=lambda file: file.size)
    names = _open_table(tables.at_hand(smallest, part / "shards")).names
    folders = _folders(classes, names, tables.name)
    share = sum(sizes) * len(folders) / len(names)
    log.info(
        "keeping the images of %d of its %d classes, about %.2f GB, in %s",
        *(len(folders), len(names), share / 1e9, place),
    )
    require_space(place, share + (0 if tables.folder else max(sizes)), tables.name)
    done = _begin(part, sorted(folders.values()))
    with progress(f"unpacking {tables.name}", len(sizes), "tables") as advance:
        for split, shard in tables.shards:
            if shard.name not in done:
                path = tables.at_hand(shard, part / "shards")
                _keep(path, folders, part / split)
                done.append(shard.name)
                write_json(part / _JOURNAL, {"classes": sorted(folders.values()), "shards": done})
                if tables.folder is None:
                    path.unlink()
            advance()
    wanted = [f"{split}/{wnid}" for split in (TRAIN, VAL) for wnid in folders.values()]
    # some are in place already if a process was killed while it moved them
    absent = [w for w in wanted if not ((part / w).is_dir() or (place / w).is_dir())]
    if absent and classes is not None:
        shutil.rmtree(part)
        split, _, wnid = absent[0].partition("/")
        raise UserError(f"{tables.name}: no image for {split} has the class {wnid}")
    if absent:  # of all classes, and the layout refuses those that have but one split
        some = ", ".join(absent[:_NAMED]) + (" …" if len(absent) > _NAMED else "")
        log.warning("%s: no image for %s: left out", tables.name, some)
    _move(part, place, wanted)
    if classes is None:
        with writing(place):
            (place / _ALL).touch()
    shutil.rmtree(part)


def _move(part: Path, place: Path, folders: Sequence[str]) -> None:
    """Put class folders that are whole in place; those moved by a killed process are there."""
    with writing(place):
        for folder in folders:
            (place / folder).parent.mkdir(exist_ok=True)
            if (part / folder).is_dir():
                shutil.rmtree(place / folder, ignore_errors=True)  # half of a class, never read
                os.replace(part / folder, place / folder)


def _begin(part: Path, wnids: list[str]) -> list[str]:
    """Shards that an earlier, killed unpacking of the same classes has done."""
    remove_leftovers(part)
    journal = remembered(part / _JOURNAL, dict[str, list[str]])
    if journal.get("classes") == wnids:
        return journal.get("shards", [])
    (part / _JOURNAL).unlink(missing_ok=True)  # before what it tells of is gone
    for split in (TRAIN, VAL):
        shutil.rmtree(part / split, ignore_errors=True)
    return []


@dataclass(frozen=True)
class _Table:
    """One shard: its rows, the columns of images and of labels, and what the labels are called."""

    rows: Iterable[dict[str, Any]]
    image: str
    label: str
    names: list[str]


def _open_table(path: Path) -> _Table:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{path}: reading parquet needs the package datasets: pip install datasets"
        ) from error
    if "::" in str(path):
        raise UserError(
            f"{path}: the package datasets takes «::» for more than a name: rename the folder"
        )
    with reading(path, "fetch it again"):
        rows = datasets.load_dataset(
            "parquet", data_files=[glob.escape(str(path))], split="train", streaming=True
        )
        columns = rows.features or {}
    images = [c for c, kind in columns.items() if isinstance(kind, datasets.Image)]
    labels = [
        c for c, kind in columns.items() if isinstance(kind, datasets.ClassLabel) and kind.names
    ]
    if not (images and labels):
        raise UserError(
            f"{path} has the columns {', '.join(columns) or 'none'}; expected one of images and "
            "one of class labels (Image and ClassLabel of the package datasets)"
        )
    rows = rows.cast_column(images[0], datasets.Image(decode=False))
    return _Table(rows, images[0], labels[0], list(columns[labels[0]].names))


def _folders(
    classes: Sequence[ClassInfo] | None, names: Sequence[str], source: str
) -> dict[int, str]:
    """Folders by the numbers of the wanted labels; `UserError` for a class that is not there."""
    if classes is None:
        for name in names:
            checks.name(f"dataset.root={source}: a class label", name)
            if is_of_machines(name):
                raise UserError(
                    f"dataset.root={source}: a class label is {name!r}, and folders that are "
                    "called so are not looked at: rename the class"
                )
        return dict(enumerate(names))
    return {_number_of(info, names, source): info.wnid for info in classes}


def _number_of(info: ClassInfo, names: Sequence[str], source: str) -> int:
    """The label's number: by wnid, by ImageNet's order, or by the class's name."""
    if info.wnid in names:
        return names.index(info.wnid)
    if len(names) == _IMAGENET_CLASSES and info.imagenet_id is not None:
        own = read_class_list("imagenet1k")
        agree = sum(_first_name(names[c.imagenet_id or 0]) == _first_name(c.name) for c in own)
        if agree < _AGREE:  # some are spelt otherwise: two classes of ImageNet share a name
            raise UserError(
                f"dataset.root={source} has 1000 labels, of which {agree} have the name that "
                f"ImageNet's order gives them, the first {names[0]!r}: another order, or other "
                "classes"
            )
        return info.imagenet_id
    first = _first_name(info.name)
    found = [n for n, name in enumerate(names) if _first_name(name) == first]
    if len(found) != 1:
        raise UserError(
            f"dataset.root={source} has {len(found)} labels called {first!r} ({info.wnid}); it has "
            f"{', '.join(names[:10])}{' …' if len(names) > 10 else ''}"
        )
    return found[0]


def _first_name(name: str) -> str:
    return name.split(",")[0].strip().replace("_", " ").lower()


def _keep(path: Path, folders: Mapping[int, str], split: Path) -> None:
    """Write a shard's images of the wanted classes, byte for byte, under the names they have.

    A row without an image becomes an empty file, which is named where all pictures are checked.
    """
    table = _open_table(path)
    unlabelled = 0
    with reading(path, "fetch it again"):
        for row, entry in enumerate(table.rows):
            label = entry[table.label]
            unlabelled += label is None or label < 0
            wnid = folders.get(label)
            if wnid is None:
                continue
            picture = entry[table.image] or {}
            content = picture.get("bytes") or b""
            name = _file_name(content, picture.get("path"), f"{path.stem}-{row:06d}")
            _require_class(name, wnid, path)
            target = split / wnid / name
            if target.exists() and target.read_bytes() != content:  # one name for many images
                target = split / wnid / f"{path.stem}-{row:06d}-{name}"
            write_atomic(target, content, flush=False)
    os.sync()  # all of a shard at once, before the journal says that it is done
    if unlabelled:
        log.warning("%s: %d images without a label are left out", path.name, unlabelled)


def _file_name(content: bytes, named: str | None, otherwise: str) -> str:
    """The name that an image has if a listing takes it, else one of its row and kind."""
    name = Path(named or "").name
    if checks.is_name(name) and is_picture(name) and len(name.encode()) <= _LONGEST_NAME:
        return name
    return f"{otherwise}{_suffix_of(content)}"


def _suffix_of(content: bytes) -> str:
    """A suffix for an image; .png also for what is none, so that it is looked at and named."""
    try:
        with Image.open(BytesIO(content)) as picture:
            kind = picture.format or ""
    except Exception:  # Pillow raises anything for content that it does not expect
        return ".png"
    if f".{kind.lower()}" in suffixes():
        return f".{kind.lower()}"
    known = Image.registered_extensions()
    return next((s for s in sorted(suffixes()) if known[s] == kind), ".png")


def _require_class(name: str, wnid: str, path: Path) -> None:
    """`UserError` if an ImageNet file's name says another class than its label."""
    match = _IMAGENET_NAME.match(name)
    said = (match[1] or match[2]) if match else None
    if said not in (None, wnid):
        raise UserError(
            f"{path}: {name} is labelled {wnid}: the labels are in another order than ImageNet's"
        )

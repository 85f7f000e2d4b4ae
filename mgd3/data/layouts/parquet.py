"""Images in parquet tables, as on the Hugging Face hub: wanted classes are unpacked to folders.

A picture in a table can only be had by reading what lies before it, so these are not read in place
as files are: the classes that a run wants are written once, byte for byte, to class folders.
"""

from __future__ import annotations

import glob
import hashlib
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
from mgd3.data.layouts.archives import require_space
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError, reading
from mgd3.runtime.progress import progress
from mgd3.storage.documents import remembered
from mgd3.storage.files import waiting, write_atomic, write_json, writing
from mgd3.storage.repositories import (
    HUB,
    HubFile,
    hub_reachable,
    published_files,
    require_repository,
    talking,
)

log = logging.getLogger(__name__)

TRAIN, VAL = "train", "val"
_SPLITS = {"train": TRAIN, "validation": VAL, "valid": VAL, "val": VAL, "test": VAL}
_SHARD = re.compile(r"(?:^|/)(train|validation|valid|val|test)(?:[-_.][^/]*|/[^/]*)?\.parquet$")
_PLACES = ("*.parquet", "data/*.parquet", *(f"{split}/*.parquet" for split in _SPLITS))
_IMAGENET_NAME = re.compile(r"(n\d{8})_\d+|ILSVRC2012_val_\d{8}_(n\d{8})")
_ALL = ".all"  # beside the class folders: every class was unpacked
_JOURNAL = "done.json"
_IMAGENET_CLASSES, _AGREE = 1000, 900
_COMMIT = ".commit.json"  # which state of a repository they are from


@dataclass(frozen=True)
class _Tables:
    """The shards of one source, by split, and where its images go."""

    name: str
    shards: tuple[tuple[str, HubFile], ...]  # split, file
    folder: Path | None  # of local shards
    repository: str = ""
    commit: str = ""

    def at_hand(self, shard: HubFile, aside: Path) -> Path:
        """A shard's local path; what must be fetched for it lies below `aside`."""
        if self.folder is not None:
            return self.folder / shard.name
        from huggingface_hub import hf_hub_download

        options: dict[str, Any] = {"repo_type": "dataset", "revision": self.commit}
        with talking(f"{self.repository}: {shard.name} could not be fetched"):
            fetched = hf_hub_download(self.repository, shard.name, local_dir=aside, **options)
        path = Path(fetched)
        if not shard.is_whole(path):
            path.unlink()
            raise UserError(
                f"{self.repository}: {shard.name} arrived with another size or checksum than "
                "the hub publishes; it was thrown away: run the same command again"
            )
        return path


def is_parquet(root: str) -> bool:
    """Does a dataset's root name tables: a repository of the hub, or a folder of *.parquet?"""
    if root.startswith(HUB):
        return True
    folder = Path(root).expanduser()
    return folder.is_dir() and bool(_local_names(folder))


def unpacked(root: str, classes: Sequence[ClassInfo] | None, data: Path) -> Path:
    """The folder with train/<class>/* and val/<class>/* of a source; None takes all its classes.

    What is not there yet is unpacked now; a killed unpacking goes on with the next shard. Raises
    `UserError` for tables without images or class labels, for classes that they have not, and for
    what the hub refuses.
    """
    place = data / "tables" / _name_of(root)
    with waiting(place):
        missing = None if classes is None else [c for c in classes if not _has(place, c.wnid)]
        if missing == [] or (place / _ALL).is_file():
            return place
        tables = _of_hub(root, place) if root.startswith(HUB) else _of_folder(root)
        _unpack(tables, missing, place)
    return place


def _name_of(root: str) -> str:
    """What the folder of a source is called: by what was typed, or by what the files are."""
    if root.startswith(HUB):
        return root.removeprefix(HUB).removeprefix("datasets/").strip("/").replace("/", "--")
    folder = Path(root).expanduser().resolve()
    stats = [(name, (folder / name).stat().st_size) for name in _local_names(folder)]
    digest = hashlib.blake2s(repr((str(folder), stats)).encode(), digest_size=6).hexdigest()
    return f"{folder.name[:60]}-{digest}"


def _has(place: Path, wnid: str) -> bool:
    return all((place / split / wnid).is_dir() for split in (TRAIN, VAL))


def _local_names(folder: Path) -> list[str]:
    found = [str(p.relative_to(folder)) for pattern in _PLACES for p in folder.glob(pattern)]
    return sorted(name for name in found if _SHARD.search(name))


def _of_folder(root: str) -> _Tables:
    folder = Path(root).expanduser()
    files = [HubFile(name, (folder / name).stat().st_size) for name in _local_names(folder)]
    return _Tables(str(folder), _by_split(str(folder), files), folder)


def _of_hub(root: str, place: Path) -> _Tables:
    """The shards of hf://USER/NAME[@REVISION][/FOLDER], at the commit that came first."""
    named = root.removeprefix(HUB).removeprefix("datasets/").strip("/")
    user, _, rest = named.partition("/")
    name, _, subfolder = rest.partition("/")
    name, _, revision = name.partition("@")
    repository = f"{user}/{name}"
    require_repository(
        "dataset.root=hf://USER/NAME[@REVISION][/FOLDER], the repository", repository
    )
    if not hub_reachable():
        raise UserError(
            f"dataset.root={root}: the hub cannot be reached, or HF_HUB_OFFLINE is set, and not "
            f"all wanted classes are in {place}"
        )
    from huggingface_hub import HfApi

    first = remembered(place / _COMMIT, dict[str, str]).get("commit")
    with talking(f"dataset.root={root} could not be looked at"):
        info = HfApi().dataset_info(
            repository, revision=first or revision or None, files_metadata=True
        )
    commit = str(info.sha)
    files = [
        f
        for f in published_files(info.siblings)
        if f.name.startswith(f"{subfolder}/" if subfolder else "") and f.name.endswith(".parquet")
    ]
    shards = _by_split(root, files)
    write_json(place / _COMMIT, {"commit": commit})
    return _Tables(root, shards, None, repository, commit)


def _by_split(root: str, files: Sequence[HubFile]) -> tuple[tuple[str, HubFile], ...]:
    """Shards with their splits; `UserError` for none of one split, and for two configurations."""
    found: dict[str, list[HubFile]] = {}
    folders = set()
    for file in files:
        if match := _SHARD.search(file.name):
            found.setdefault(match[1], []).append(file)
            folders.add(file.name[: match.start()].strip("/"))
    if len(folders) > 1:
        raise UserError(
            f"dataset.root={root} holds several tables ({', '.join(sorted(folders))}): add the "
            f"folder that you want, such as dataset.root={root}/{sorted(folders)[-1]}"
        )
    val = next((split for split in _SPLITS if _SPLITS[split] == VAL and split in found), None)
    if TRAIN not in found or val is None:
        raise UserError(
            f"dataset.root={root}: expected parquet files called train-* and validation-* (or "
            f"test-*); found {', '.join(sorted(found)) or 'none'}"
        )
    return tuple(
        (split, file)
        for key, split in ((TRAIN, TRAIN), (val, VAL))
        for file in sorted(found[key], key=lambda f: f.name)
    )


def _unpack(tables: _Tables, classes: Sequence[ClassInfo] | None, place: Path) -> None:
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
    with progress(f"unpacking {tables.name}, tables", len(sizes)) as advance:
        for split, shard in tables.shards:
            if shard.name not in done:
                path = tables.at_hand(shard, part / "shards")
                _keep(path, folders, part / split)
                done.append(shard.name)
                write_json(part / _JOURNAL, {"classes": sorted(folders.values()), "shards": done})
                if tables.folder is None:
                    path.unlink()
            advance()
    absent = [(s, w) for s in (TRAIN, VAL) for w in folders.values() if not (part / s / w).is_dir()]
    if absent:
        split, wnid = absent[0]
        raise UserError(f"{tables.name}: no image for {split} has the class {wnid}")
    with writing(place):
        for split in (TRAIN, VAL):
            (place / split).mkdir(exist_ok=True)
            for wnid in folders.values():
                os.replace(part / split / wnid, place / split / wnid)
        if classes is None:
            (place / _ALL).touch()
    shutil.rmtree(part)


def _begin(part: Path, wnids: list[str]) -> list[str]:
    """Shards that an earlier, killed unpacking of the same classes has done."""
    journal = remembered(part / _JOURNAL, dict[str, list[str]])
    if journal.get("classes") == wnids:
        return journal.get("shards", [])
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
    with reading(path, "fetch it again"):
        rows = datasets.load_dataset(
            "parquet", data_files=[glob.escape(str(path))], split="train", streaming=True
        )
        columns = rows.features or {}
    images = [c for c, kind in columns.items() if isinstance(kind, datasets.Image)]
    labels = [c for c, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
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
        return {
            n: checks.name(f"dataset.root={source}: a class label", name)
            for n, name in enumerate(names)
        }
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
    """Write a shard's images of the wanted classes, byte for byte, under the names they have."""
    table = _open_table(path)
    with reading(path, "fetch it again"):
        for row, entry in enumerate(table.rows):
            wnid = folders.get(entry[table.label])
            if wnid is None:
                continue
            content, named = entry[table.image]["bytes"], entry[table.image]["path"]
            name = _file_name(content, named, f"{path.stem}-{row:06d}")
            _require_class(name, wnid, path)
            target = split / wnid / name
            if target.exists() and target.read_bytes() != content:  # one name for many images
                target = split / wnid / f"{path.stem}-{row:06d}-{name}"
            write_atomic(target, content)


def _file_name(content: bytes, named: str | None, otherwise: str) -> str:
    name = Path(named or "").name
    if checks.is_name(name) and Path(name).suffix:
        return name
    with Image.open(BytesIO(content)) as picture:
        return f"{otherwise}.{(picture.format or 'png').lower()}"


def _require_class(name: str, wnid: str, path: Path) -> None:
    """`UserError` if an ImageNet file's name says another class than its label."""
    match = _IMAGENET_NAME.match(name)
    said = (match[1] or match[2]) if match else None
    if said not in (None, wnid):
        raise UserError(
            f"{path}: {name} is labelled {wnid}: the labels are in another order than ImageNet's"
        )

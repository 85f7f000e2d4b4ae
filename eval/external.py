"""A folder of images that was made elsewhere, taken in as a distilled dataset."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.decoding import decode
from mgd3.data.distilled import MANIFEST, DistilledDataset
from mgd3.data.layouts.listing import counted, list_pictures
from mgd3.data.layouts.trees import class_folders
from mgd3.runtime.errors import UserError, reading
from mgd3.storage.files import refuse_links, remove_leftovers, write_json

log = logging.getLogger(__name__)

_WAYS: tuple[Callable[[ClassInfo], str], ...] = (
    lambda c: c.wnid,
    lambda c: str(c.imagenet_id),
    lambda c: c.name,
    lambda c: c.name.split(",")[0],
)


def adopt(
    folder: Path,
    dataset: RealDataset,
    method: str,
    runs: Path,
    identity: Mapping[str, Any],
) -> DistilledDataset:
    """A set below `runs` whose manifest lists the images of `folder`/<class>/* where they lie.

    Classes are named by wnid, ImageNet index, or name. `method` is what tables call the set,
    `identity` what is known of how it was made: its dataset's.
    Raises `UserError` if a class has no folder or no image, a folder no class, or a file cannot
    be read or lies elsewhere.
    """
    entries: list[dict[str, Any]] = []
    root = folder / "images" if (folder / "images").is_dir() else folder
    refuse_links(root)
    for info, place in zip(dataset.classes, _class_folders(root, dataset), strict=True):
        found = list_pictures(place)
        if found.left_out:
            log.warning("%s: %s left out", place, counted(found.left_out))
        files = [place / file for file in found.files]
        if not files:
            raise UserError(f"{place} holds no image; every class needs one")
        for index, file in enumerate(files):
            _require_readable(file)
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            name = str(file.relative_to(root))
            entries.append({"file": name, "wnid": info.wnid, "index": index, "sha256": digest})
    content = "".join(entry["wnid"] + entry["sha256"] for entry in entries)
    digest = hashlib.blake2s(content.encode(), digest_size=4).hexdigest()
    out = runs / "evaluated" / dataset.name / f"{method}-{digest}"
    manifest = {
        "dataset": dataset.name,
        "dataset_note": dataset.note,
        "ipc": max(Counter(entry["wnid"] for entry in entries).values()),
        "seed": None,
        "method": method,
        "identity": {**identity, "method": method, "images": digest},
        "config": {},
        "data": {"train": None},
        "classes": [asdict(c) for c in dataset.classes],
        "elsewhere": True,  # where is for the command line to say, not for a file
        "images": entries,
    }
    remove_leftovers(out)
    write_json(out / MANIFEST, manifest)
    return DistilledDataset(out, root)


def _class_folders(root: Path, dataset: RealDataset) -> list[Path]:
    """One folder per class, in label order."""
    if not root.is_dir():
        raise UserError(f"images={root} is not a folder")
    places = [root / name for name in class_folders(root)]
    folders = {_plain(f.name): f for f in places}
    for name_of in _WAYS:
        names = [_plain(name_of(c)) for c in dataset.classes]
        # crane is a bird and a machine: a name that two classes share tells neither
        if len(places) == len(set(names)) == len(names) and set(names) == set(folders):
            return [folders[name] for name in names]
    first = dataset.classes[0]
    index = "" if first.imagenet_id is None else f", index {first.imagenet_id}"
    raise UserError(
        f"images={root} has the class folders {', '.join(list(folders)[:5])} ({len(folders)}), "
        f"which are not the {len(dataset.classes)} classes of dataset={dataset.name} by wnid, "
        f"ImageNet index or name; the first class is {first.wnid}{index}, {first.name}"
    )


def _plain(name: str) -> str:
    """A name as folders may spell it: «English springer» is english_springer, 00217 is 217."""
    name = name.lower().replace(" ", "_").replace("-", "_")
    return name.lstrip("0") or "0" if name.isdigit() else name


def _require_readable(file: Path) -> None:
    if not file.is_file():
        raise UserError(f"{file} is no file; remove it")
    with reading(file, "it is not a readable image: replace or remove it"):
        decode(file)  # all of it: half a JPEG passes Pillow's verify()

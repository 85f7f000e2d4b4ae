"""How a dataset's files lie below its root: recognised, read in place, nothing copied or moved."""

from __future__ import annotations

import csv
import hashlib
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import product
from pathlib import Path

from mgd3.data.layouts.listing import (
    Listing,
    entries,
    is_of_machines,
    list_pictures,
    require_utf8,
)
from mgd3.runtime.errors import UserError, reading
from mgd3.runtime.progress import progress
from mgd3.storage.documents import remembered
from mgd3.storage.files import remember

TRAIN, VAL = "train", "val"
_VAL_NAMES = ("val", "validation")
_TRAINING_NAME = re.compile(r"n\d{8}_\d+")  # ImageNet's training photographs carry their wnid
_VALIDATION_NAME = "ILSVRC2012_val_"
_GLIMPSE = 20  # files of each class that tell a re-split from ImageNet's own
_TRAINING_PHOTOGRAPHS = {"n03000684": 1194, "n02089973": 754}  # chain saw, English foxhound
_MOST, _VALIDATION_PHOTOGRAPHS = 1300, 50  # of every other class of both datasets
_TINY = "val_annotations.txt"  # Tiny-ImageNet's table of validation files
_NAMED = 5
_MANY_FOLDERS = 100  # below, a bar is not worth its line
_LOOKERS = 16


class ClassFolders:
    """`train/<class>/*` and `val/<class>/*` (or `validation/`), pictures at any depth."""

    note: str | None = None

    def __init__(self, folders: Mapping[str, Path]) -> None:
        """`folders` holds the class folders of each split."""
        self.folders = dict(folders)
        self._listings: dict[tuple[str, str], Listing] = {}

    @cached_property
    def wnids(self) -> list[str]:
        """Class folders of the training split, sorted."""
        return class_folders(self.folders[TRAIN])

    def look(self, wnids: Sequence[str]) -> None:
        """List all these classes at once: on network storage every folder is a wait."""
        wanted = [key for key in product((TRAIN, VAL), wnids) if key not in self._listings]
        if len(wanted) < _MANY_FOLDERS:
            return
        with (
            progress("listing the real images", len(wanted), "folders") as advance,
            ThreadPoolExecutor(_LOOKERS) as pool,
        ):
            for key, found in zip(
                wanted, pool.map(lambda k: self._listing(*k), wanted), strict=True
            ):
                self._listings[key] = found
                advance()

    def listing(self, split: str, wnid: str) -> Listing:
        """Pictures of a class, as paths below `place(split, wnid)`; looked at once."""
        key = split, wnid
        if key not in self._listings:
            self._listings[key] = self._listing(split, wnid)
        return self._listings[key]

    def place(self, split: str, wnid: str, file: str) -> Path:
        """Where a picture lies."""
        return self.folders[split].joinpath(wnid, file)  # one path, not two: there may be millions

    def remarks(self) -> list[str]:
        """What of the tree is no part of the dataset."""
        found = []
        others = sorted(set(class_folders(self.folders[VAL])) - set(self.wnids))
        if others:
            found.append(f"classes of val/ that train/ has not are left out: {_some(others)}")
        for split, folder in self.folders.items():
            if loose := _loose(folder):
                found.append(f"{loose} files beside the class folders of {split}/ are left out")
        return found

    def _listing(self, split: str, wnid: str) -> Listing:
        return list_pictures(self.folders[split] / wnid)


class RestoredImageNet(ClassFolders):
    """fast.ai's re-split archives of ImageNette and ImageWoof, put back by their files' names.

    ImageNet's validation photographs are called ILSVRC2012_val_*, in whichever folder they lie; all
    others are its training photographs.
    """

    note = (
        "ImageNet's own split, restored from fast.ai's archive by the names of its files; whether "
        "the archive's files are ImageNet's byte for byte is not known"
    )

    def __init__(self, folders: Mapping[str, Path]) -> None:
        super().__init__(folders)
        self._places: dict[tuple[str, str, str], Path] = {}

    def place(self, split: str, wnid: str, file: str) -> Path:
        """In either folder of the archive."""
        self.listing(split, wnid)
        return self._places[split, wnid, file]

    def _listing(self, split: str, wnid: str) -> Listing:
        files, left_out = [], dict[str, int]()
        for folder in self.folders.values():
            found = list_pictures(folder / wnid)
            for reason, count in found.left_out.items():
                left_out[reason] = left_out.get(reason, 0) + count
            for file in found.files:
                if file.rpartition("/")[2].startswith(_VALIDATION_NAME) == (split == VAL):
                    files.append(file)
                    self._places[split, wnid, file] = folder / wnid / file
        return Listing(tuple(sorted(files)), left_out if split == TRAIN else {})  # said once

    def shortfall(self, wnids: Sequence[str]) -> list[str]:
        """Classes that lack photographs of ImageNet's, with how many they have."""
        found = []
        for wnid in wnids:
            wanted = {TRAIN: _TRAINING_PHOTOGRAPHS.get(wnid, _MOST), VAL: _VALIDATION_PHOTOGRAPHS}
            for split, count in wanted.items():
                there = len(self.listing(split, wnid).files)
                if there != count:
                    found.append(f"{wnid} has {there:,} of {count:,} {split} photographs")
        return found


class FlatValidation(ClassFolders):
    """As ImageNet and Tiny-ImageNet are handed out: validation files in one folder, and a table."""

    def __init__(self, train: Path, val: Path, classes: Mapping[str, str]) -> None:
        """`classes` is the wnid of each validation file by its name without suffix."""
        super().__init__({TRAIN: train, VAL: val})
        self._by_class: dict[str, list[str]] = defaultdict(list)
        for file in list_pictures(val).files:
            wnid = classes.get(Path(file).stem)
            if wnid is not None:
                self._by_class[wnid].append(file)
        self.note = None

    def place(self, split: str, wnid: str, file: str) -> Path:
        """Of validation, in the one folder."""
        return self.folders[VAL] / file if split == VAL else super().place(split, wnid, file)

    def remarks(self) -> list[str]:
        """Nothing: loose files are what it is about."""
        return []

    def _listing(self, split: str, wnid: str) -> Listing:
        if split == VAL:
            return Listing(tuple(sorted(self._by_class[wnid])))
        return super()._listing(split, wnid)


class HeldOut(ClassFolders):
    """`<class>/*` without a split: a share of each class, chosen by content, is for tests.

    Names do not matter. Where photographs come or go, a few near the border may change sides: the
    share stays what it was.
    """

    def __init__(self, root: Path, fraction: float, cache: Path) -> None:
        super().__init__({TRAIN: root, VAL: root})
        self._fraction, self._cache = fraction, cache
        self.note = f"{fraction:g} of each class, chosen by content, are the test images"

    def remarks(self) -> list[str]:
        """Loose files once, not twice."""
        loose = _loose(self.folders[TRAIN])
        return [f"{loose} files beside the class folders are left out"] if loose else []

    def _listing(self, split: str, wnid: str) -> Listing:
        found = list_pictures(self.folders[TRAIN] / wnid)
        shares = self._shares(wnid, found.files)
        # the smallest shares: at least one for tests, at least one for training
        count = min(max(1, round(self._fraction * len(shares))), max(0, len(shares) - 1))
        held_out = {file for _, file in sorted((share, f) for f, share in shares.items())[:count]}
        files = tuple(f for f in found.files if (f in held_out) == (split == VAL))
        return Listing(files, found.left_out if split == TRAIN else {})  # said once

    def _shares(self, wnid: str, files: Sequence[str]) -> dict[str, str]:
        """A digest of each file's content; remembered by size and time."""
        folder = self.folders[TRAIN] / wnid
        place = hashlib.blake2s(str(folder.resolve()).encode(), digest_size=8).hexdigest()
        memory = self._cache / "inventory" / "held_out" / f"{place}.json"
        known = remembered(memory, dict[str, tuple[tuple[int, int], str]])
        seen = {}
        for file in files:
            if not (folder / file).is_file():  # as a link to nothing: named where all are checked
                seen[file] = (0, 0), ""
                continue
            stat = (folder / file).stat()
            stamp = stat.st_size, stat.st_mtime_ns
            if file in known and known[file][0] == stamp:
                seen[file] = known[file]
            else:
                content = (folder / file).read_bytes()
                seen[file] = stamp, hashlib.blake2s(content, digest_size=16).hexdigest()
        if seen != known:
            remember(memory, seen)
        return {file: digest for file, (_, digest) in seen.items()}


def _loose(folder: Path) -> int:
    """Files beside the class folders, but for the table of their names."""
    names = [name for name, is_folder in entries(folder) if not is_folder]
    return sum(not is_of_machines(n) and n != "classes.csv" for n in names)


def class_folders(folder: Path) -> list[str]:
    """Names of class folders, sorted; not those that operating systems make."""
    names = [n for n, is_folder in entries(folder) if is_folder and not is_of_machines(n)]
    for name in names:
        require_utf8(folder, name)
    return sorted(names)


def find_layout(
    root: Path, restorable: bool, split: str | None, val_fraction: float | None, cache: Path
) -> ClassFolders:
    """The layout of `root`; `UserError` that says what was found where it is none.

    `restorable`: a re-split by fast.ai is put back, unless `split` is «fastai». `val_fraction` is
    for a root without a split.
    """
    if not root.is_dir():
        raise UserError(f"dataset.root={root} does not exist or is no folder{_of_hub(root)}")
    kaggle = next((r for r in (root / "ILSVRC/Data/CLS-LOC", root) if _is_flat(r)), None)
    if kaggle is not None:
        return FlatValidation(kaggle / TRAIN, kaggle / VAL, _validation_classes(root, kaggle))
    train, val = root / TRAIN, next((root / n for n in _VAL_NAMES if (root / n).is_dir()), None)
    if train.is_dir() and val is not None and (val / _TINY).is_file():
        return FlatValidation(train, val / "images", _tiny_classes(val / _TINY))
    if train.is_dir() and val is not None:
        layout = ClassFolders({TRAIN: train, VAL: val})
        if restorable and split != "fastai" and is_resplit(layout, layout.wnids):
            return RestoredImageNet(layout.folders)
        return layout
    if val_fraction is not None and not train.is_dir():
        return HeldOut(root, val_fraction, cache)
    raise UserError(_what_was_found(root))


def _of_hub(root: Path) -> str:
    """What to write for a data set of the Hugging Face hub."""
    if root.is_absolute() or len(root.parts) != 2:
        return ""
    return f"; a data set of the Hugging Face hub is written hf://{root}"


def is_resplit(layout: ClassFolders, wnids: Sequence[str]) -> bool:
    """Do ImageNet's training and validation photographs lie mixed, as in fast.ai's archives?"""
    for split in (TRAIN, VAL):
        for wnid in wnids:
            for name in _first_names(layout.folders[split] / wnid):
                own = (
                    name.startswith(_VALIDATION_NAME)
                    if split == TRAIN
                    else (_TRAINING_NAME.match(name) is not None)
                )
                if own:
                    return True
    return False


def _first_names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry, _ in zip(entries, range(_GLIMPSE), strict=False)]
    except OSError:
        return []


def _is_flat(folder: Path) -> bool:
    """Does val/ hold ImageNet's files loose, beside a train/ in class folders?"""
    names = _first_names(folder / VAL)
    return (folder / TRAIN).is_dir() and any(
        n.startswith(_VALIDATION_NAME) and "." in n for n in names
    )


def _validation_classes(root: Path, folder: Path) -> dict[str, str]:
    """Wnids of ImageNet's validation files, from Kaggle's table or the development kit's."""
    for place in (root, folder):
        for table in place.glob("LOC_val_solution.csv"):
            with reading(table, "get the table again"), table.open(newline="") as file:
                rows = csv.DictReader(file)
                return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows}
        for truth in place.rglob("ILSVRC2012_validation_ground_truth.txt"):
            tables = [*truth.parent.glob("map_clsloc.txt"), *place.rglob("map_clsloc.txt")]
            if not tables:
                raise UserError(
                    f"{truth} numbers the classes, and map_clsloc.txt, which names their numbers "
                    "(lines «wnid number name»), is not beside it: put it there"
                )
            with reading(truth, "get the development kit again"):
                return _by_number(truth, tables[0])
    raise UserError(
        f"{folder / VAL} holds ImageNet's validation files loose, and nothing says their classes: "
        f"put Kaggle's LOC_val_solution.csv or the development kit's data/ into {root}, or sort "
        "the files into class folders"
    )


def _by_number(truth: Path, table: Path) -> dict[str, str]:
    wnids = {}
    for line in table.read_text().splitlines():
        wnid, number, *_ = line.split()
        wnids[int(number)] = wnid
    numbers = [int(line) for line in truth.read_text().split()]
    return {f"{_VALIDATION_NAME}{k:08d}": wnids[n] for k, n in enumerate(numbers, start=1)}


def _tiny_classes(table: Path) -> dict[str, str]:
    """Wnids of Tiny-ImageNet's validation files; lines «file TAB wnid TAB box»."""
    with reading(table, "get the table again"):
        rows = [line.split("\t") for line in table.read_text().splitlines() if line]
        return {Path(file).stem: wnid for file, wnid, *_ in rows}


def refuse_twins(wnids: Sequence[str]) -> None:
    """`UserError` for two class folders whose names are one text in two encodings."""
    seen: dict[str, str] = {}
    for wnid in wnids:
        twin = seen.setdefault(unicodedata.normalize("NFC", wnid), wnid)
        if twin != wnid:
            raise UserError(
                f"dataset.root: {wnid!r} stands there twice, as composed and decomposed Unicode; "
                "merge the two folders"
            )


def _what_was_found(root: Path) -> str:
    """What `root` holds instead of train/ and val/, and what to do about it."""
    folders = class_folders(root)
    lower = {name.lower(): name for name in folders}
    if root.name.lower() in (TRAIN, *_VAL_NAMES, "test") and any(
        (root.parent / n).is_dir() for n in (TRAIN, *_VAL_NAMES)
    ):
        return f"dataset.root={root} is one of the splits: give the folder above it, {root.parent}"
    for wrong in ("train", "training", "test", "testing", "valid", "val", "validation"):
        name = lower.get(wrong)
        if name is not None and name not in (TRAIN, *_VAL_NAMES):
            return (
                f"dataset.root={root} has {_some(folders)}: call the folders train/ and val/ (or "
                "validation/), in lower case"
            )
    pictures = sum(bool(list_pictures(root / name).files) for name in folders[:_NAMED])
    if TRAIN not in folders and pictures:
        return (
            f"dataset.root={root} has no train/ and val/, but the folders {_some(folders)}; if "
            "they are classes, hold a share of each out for tests: dataset.val_fraction=0.2"
        )
    loose = len([name for name, is_folder in entries(root) if not is_folder])
    there = f"the folders {_some(folders)}" if folders else f"{loose} files and no folder"
    missing = "val or validation" if TRAIN in folders else "train and val (or validation)"
    return (
        f"dataset.root={root} has no folder {missing}; it has {there}; expected "
        f"{root}/train/<class>/* and {root}/val/<class>/*"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" … ({len(names)})" if len(names) > _NAMED else "")

"""Real images: what classes a dataset has, in which order, and how a file becomes pixels."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from PIL import Image

from mgd3.data.class_lists import ClassInfo, read_class_list, read_names
from mgd3.data.decoding import decode
from mgd3.data.layouts.archives import (
    ARCHIVES,
    data_folder,
    fetch_archive,
    find_archive,
    may_fetch,
    note_of,
)
from mgd3.data.layouts.listing import counted, list_pictures
from mgd3.data.layouts.parquet import unpacked
from mgd3.data.layouts.shards import is_parquet
from mgd3.data.layouts.trees import (
    TRAIN,
    VAL,
    FlatValidation,
    HeldOut,
    RestoredImageNet,
    find_layout,
    is_resplit,
    refuse_twins,
)
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError


class RealImage(Protocol):
    """One real image."""

    @property
    def key(self) -> str:
        """Its name within its dataset, whatever machine it is on."""

    def stamp(self) -> tuple[int, int]:
        """Size in bytes and modification time: unchanged means content unchanged."""

    def content(self) -> bytes:
        """The bytes that identify it."""

    def decode(self) -> Image.Image:
        """RGB, upright."""


@dataclass(frozen=True)
class ImageFile:
    """A JPEG, PNG or WebP file."""

    key: str
    path: Path

    def stamp(self) -> tuple[int, int]:
        """Size and modification time (ns)."""
        stat = self.path.stat()
        return stat.st_size, stat.st_mtime_ns

    def content(self) -> bytes:
        """The file's bytes."""
        self._require_file()
        return self.path.read_bytes()

    def decode(self) -> Image.Image:
        """As `decoding.decode` reads files."""
        self._require_file()
        return decode(self.path)

    def _require_file(self) -> None:
        """`OSError` for a FIFO or a device, which could be read for ever."""
        if not self.path.is_file():
            raise OSError(f"{self.path} is no file")


class RealDataset(Protocol):
    """Real images by split («train» or «val») and class; label = position in `classes`."""

    name: str
    classes: tuple[ClassInfo, ...]
    student_size: int
    skip_broken: bool

    @property
    def location(self) -> Path | None:
        """The folder or file; None: the images are in memory."""

    @property
    def note(self) -> str | None:
        """What a reader of results must know about these files, if anything."""

    def images(self, split: str, label: int) -> Sequence[RealImage]:
        """The images of a class, in lexicographic order of their keys."""


class ImageTree:
    """Images in folders: `train/<class>/*` and `val/<class>/*`, or as trees.py recognises.

    With a built-in class list the root may hold more classes than the list, in any order; without
    one (`class_list` None) every folder of `train/` is a class, in sorted order, and a class's name
    is its folder's, or what `<root>/classes.csv` (columns folder, name) says.
    """

    def __init__(
        self,
        name: str,
        class_list: str | None,
        root: str | None,
        student_size: int,
        classes: Sequence[str] | None = None,
        max_per_class: int | None = None,
        skip_broken: bool = False,
        split: str | None = None,
        val_fraction: float | None = None,
        archive: str | None = None,
        download: bool = False,
        data: Path | str | None = None,
        cache: Path = Path("cache"),
    ) -> None:
        """`split` «fastai» keeps the archives' re-split of ImageNette and ImageWoof.

        `val_fraction` holds a share of each class out for tests where there is no val/.
        Where `root` is None, the public `archive` is used, fetched to `data` if `download` allows
        it. A root of parquet tables (hf://USER/NAME, or a folder) is unpacked there.
        """
        self.name = checks.name("dataset.name", name)
        self.student_size = checks.integer("dataset.student_size", student_size, minimum=8)
        self.skip_broken = checks.flag("dataset.skip_broken", skip_broken)
        self.max_per_class = (
            None
            if max_per_class is None
            else checks.integer("dataset.max_per_class", max_per_class, minimum=1)
        )
        if split is not None:
            checks.choice("dataset.split", split, ["fastai"])
        if val_fraction is not None:
            checks.number("dataset.val_fraction", val_fraction, minimum=0.01, maximum=0.9)
        place = data_folder(data)
        if root is None:
            root = str(_archive(name, archive, download, place))
        if is_parquet(str(root)):
            wanted = select_classes(read_class_list(class_list), classes) if class_list else None
            root = str(unpacked(str(root), wanted, place))
        self.root = Path(str(root)).expanduser()  # a Path: where files lie is no setting
        self.location: Path | None = self.root.resolve()
        restorable = class_list in _RESTORABLE
        self._layout = find_layout(self.root, restorable, split, val_fraction, cache)
        known = read_class_list(class_list) if class_list else self._folders_as_classes()
        self.classes = select_classes(known, classes)
        self._layout.look([c.wnid for c in self.classes])
        self._require_class_folders()

    @cached_property
    def note(self) -> str | None:
        """What readers of a table must know: a re-split, a restored one, images held out."""
        notes = [*self._notes_of_split(), note_of(self.root)]
        return "; ".join(n for n in notes if n) or None

    def _notes_of_split(self) -> list[str | None]:
        wnids = [c.wnid for c in self.classes]
        if isinstance(self._layout, RestoredImageNet):
            return [self._layout.note, *self._layout.shortfall(wnids)]
        if self._layout.note is None and is_resplit(self._layout, wnids):
            return [
                "these files are fast.ai's re-split (training and validation photographs of "
                "ImageNet mixed), another dataset than the papers': do not compare with published "
                "numbers"
            ]
        return [self._layout.note]

    def remarks(self) -> list[str]:
        """What is left out, with counts."""
        found = self._layout.remarks()
        for c in self.classes:
            total: Counter[str] = Counter()
            for split in (TRAIN, VAL):
                total.update(self._layout.listing(split, c.wnid).left_out)
            if total:
                found.append(f"{c.wnid}: {counted(total)}")
        return found

    def images(self, split: str, label: int) -> Sequence[RealImage]:
        """The files of one class in lexicographic path order, at most `max_per_class` of train."""
        wnid = self.classes[label].wnid
        files = self._layout.listing(split, wnid).files
        if split == TRAIN:
            files = files[: self.max_per_class]
        place = self._layout.place
        return [ImageFile(f"{split}/{wnid}/{file}", place(split, wnid, file)) for file in files]

    def _folders_as_classes(self) -> tuple[ClassInfo, ...]:
        imagenet = {c.wnid: c for c in read_class_list("imagenet1k")}
        names = read_names(self.root / "classes.csv")
        wnids = self._layout.wnids
        if not wnids:
            raise UserError(f"dataset.root: {self._layout.folders[TRAIN]} has no class folders")
        for wnid in wnids:
            checks.name("dataset.root: a class folder", wnid)
        refuse_twins(wnids)
        for folder in names:
            checks.choice(f"a folder in {self.root / 'classes.csv'}", folder, wnids)
        known = (imagenet.get(w, ClassInfo(w, w.replace("_", " "))) for w in wnids)
        return tuple(replace(c, name=names.get(c.wnid, c.name)) for c in known)

    def _require_class_folders(self) -> None:
        for split in (TRAIN, VAL):
            folder = self._layout.folders[split]
            empty = [c.wnid for c in self.classes if not self._layout.listing(split, c.wnid).files]
            missing = [w for w in empty if not (folder / w).is_dir()]
            if missing and not isinstance(self._layout, FlatValidation):
                loose = (
                    " (its images lie loose: sort them into class folders)"
                    if list_pictures(folder, deep=False).files
                    else ""
                )
                raise UserError(
                    f"dataset={self.name}: {len(missing)} of {len(self.classes)} class folders are "
                    f"missing in {folder}{loose}, the first is {missing[0]}"
                )
            if empty and isinstance(self._layout, HeldOut) and split == VAL:
                raise UserError(
                    f"dataset={self.name}: {folder / empty[0]} holds one picture, and with "
                    "dataset.val_fraction each class needs two: one is held out for tests"
                )
            if empty:
                raise UserError(
                    f"dataset={self.name}: {folder / empty[0]} holds no image that Pillow reads; "
                    f"{split} needs at least one per class"
                )


def _archive(name: str, archive: str | None, download: bool, place: Path) -> Path:
    """The unpacked public archive, fetched now if that is allowed."""
    if archive is None:
        raise UserError(
            f"dataset.root is not set: dataset={name} reads images from disk; give the folder that "
            "holds train/ and val/ (or validation/), e.g. dataset.root=PATH"
        )
    known = ARCHIVES[checks.choice("dataset.archive", archive, ARCHIVES)]
    folder = find_archive(archive, place)
    if folder is not None:
        return folder
    if not (download and may_fetch()):
        raise UserError(
            f"dataset.root is not set, and fast.ai's archive is not in {place}: «python "
            f"scripts/fetch_data.py {archive}» fetches it ({known.gigabytes} GB), so does "
            f"dataset.download=true; without a network, unpack {known.name}.tgz there, or give "
            "ImageNet's folder with dataset.root=PATH"
        )
    return fetch_archive(archive, place)


_RESTORABLE = ("imagenette", "imagewoof")


def select_classes(known: tuple[ClassInfo, ...], wanted: object) -> tuple[ClassInfo, ...]:
    """The wanted classes, one key or a list of keys, in their order; all for None."""
    if wanted is None:
        return known
    keys = list(wanted) if isinstance(wanted, list | tuple) else [wanted]
    chosen = tuple(_class_of(known, key) for key in keys)
    if not chosen or len(set(chosen)) != len(chosen):
        raise UserError(f"dataset.classes={wanted!r} must be a list of different classes")
    return chosen


def _class_of(known: tuple[ClassInfo, ...], key: object) -> ClassInfo:
    """The class that a key means: by folder, then by name, then by the first of its names.

    Raises `UserError` for a key of none, and for one of two.
    """
    ways: tuple[Callable[[ClassInfo], str], ...] = (
        lambda c: c.wnid,
        lambda c: c.name,
        lambda c: c.name.split(",")[0].strip(),
    )
    for name_of in ways:
        found = [c for c in known if means(key, name_of(c))]
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"dataset.classes={key!r} is the name of {len(found)} classes; say which by its "
                f"folder: {', '.join(c.wnid for c in found)}"
            )
    checks.choice("dataset.classes", key, [c.wnid for c in known])
    raise AssertionError("unreachable: the choice is refused")


def means(key: object, text: str) -> bool:
    """Is a key, as a command line gives it, this text? 1e3 there is a number, here a name."""
    if isinstance(key, str):
        return key == text
    value = _as_typed(text)
    both_nan = value != value and key != key
    return type(value) is type(key) and (value == key or both_nan)


def _as_typed(text: str) -> object:
    """What a command line takes a name for if it is not quoted; itself where it is only text."""
    words: dict[str, object] = {"null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    if re.fullmatch(r"0\d[\d_]*", text):
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

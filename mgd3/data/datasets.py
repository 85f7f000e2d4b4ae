"""Real images: what classes a dataset has, in which order, and how a file becomes pixels."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from mgd3.data.class_lists import ClassInfo, read_class_list, read_names
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_VAL_NAMES = ("val", "validation")


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
        """RGB: EXIF rotation applied, alpha laid on white, 16-bit grey scaled to 8."""
        self._require_file()
        with Image.open(self.path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                rgba = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return image.convert("RGB")

    def _require_file(self) -> None:
        """`OSError` for a FIFO or a device, which could be read for ever."""
        if not self.path.is_file():
            raise OSError(f"{self.path} is no file")


@dataclass(frozen=True)
class ArrayImage:
    """An 8-bit grey image that a package ships in memory."""

    key: str
    pixels: np.ndarray  # (H, W) uint8

    def stamp(self) -> tuple[int, int]:
        """Never changes."""
        return self.pixels.nbytes, 0

    def content(self) -> bytes:
        """The pixels."""
        return self.pixels.tobytes()

    def decode(self) -> Image.Image:
        """RGB."""
        return Image.fromarray(self.pixels).convert("RGB")


class RealDataset(Protocol):
    """Real images by split («train» or «val») and class; label = position in `classes`."""

    name: str
    classes: tuple[ClassInfo, ...]
    student_size: int
    skip_broken: bool
    location: Path | None  # None: the images are in memory

    @property
    def note(self) -> str | None:
        """What a reader of results must know about these files, if anything."""

    def images(self, split: str, label: int) -> Sequence[RealImage]:
        """The images of a class, in lexicographic order of their keys."""


class Digits:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8, split 60/40 and stratified.

    The split is a fixed permutation (seed 0), so every machine has the same 1,078 training and
    719 test images.
    """

    name = "digits"
    skip_broken = False
    location = None
    note = None

    def __init__(self, student_size: int, classes: Sequence[int] | None = None) -> None:
        """`classes` keeps some of the ten digits, in their given order."""
        self.student_size = checks.integer("dataset.student_size", student_size, minimum=4)
        known = tuple(ClassInfo(str(d), f"digit {d}") for d in range(10))
        self.classes = _select(known, classes)

    @cached_property
    def _splits(self) -> dict[str, dict[int, list[ArrayImage]]]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), was 0..16
        train, val = train_test_split(
            np.arange(len(pixels)), test_size=0.4, random_state=0, stratify=digits.target
        )
        return {
            split: {
                label: [
                    ArrayImage(f"{split}/{label}/{i:04d}", pixels[i])
                    for i in sorted(rows)
                    if digits.target[i] == label
                ]
                for label in range(10)
            }
            for split, rows in (("train", train), ("val", val))
        }

    def images(self, split: str, label: int) -> Sequence[RealImage]:
        """The digits of one class."""
        return self._splits[split][int(self.classes[label].wnid)]


class ImageTree:
    """`<root>/train/<class>/*` and `<root>/val/<class>/*` (or `validation/`).

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
    ) -> None:
        self.name = checks.name("dataset.name", name)
        self.student_size = checks.integer("dataset.student_size", student_size, minimum=8)
        self.skip_broken = checks.flag("dataset.skip_broken", skip_broken)
        self.max_per_class = (
            None
            if max_per_class is None
            else checks.integer("dataset.max_per_class", max_per_class, minimum=1)
        )
        if root is None:
            raise UserError(
                f"dataset.root is not set: dataset={name} reads images from disk; give the folder "
                "that holds train/ and val/ (or validation/), e.g. dataset.root=PATH"
            )
        self.root = Path(str(root)).expanduser()  # a Path: where files lie is no setting
        self.location: Path | None = self.root.resolve()
        self._folders = {"train": self._split("train"), "val": self._split(*_VAL_NAMES)}
        known = read_class_list(class_list) if class_list else self._folders_as_classes()
        self.classes = _select(known, classes)
        self._require_class_folders()

    @cached_property
    def note(self) -> str | None:
        """Recognises fast.ai's re-split: their val/ holds ImageNet training files."""
        wnids = [c.wnid for c in self.classes]
        mixed = any(f.name.startswith("ILSVRC2012_val_") for f in self._glimpse("train", wnids))
        mixed |= any(re.match(r"n\d{8}_\d+", f.name) for f in self._glimpse("val", wnids))
        if not mixed:
            return None
        return (
            "these files are fast.ai's re-split (training and validation photographs of ImageNet "
            "mixed), another dataset than the papers': do not compare with published numbers"
        )

    def images(self, split: str, label: int) -> Sequence[RealImage]:
        """The files of one class in lexicographic path order, at most `max_per_class` of train."""
        wnid = self.classes[label].wnid
        files = _image_files(self._folders[split] / wnid)
        if split == "train":
            files = files[: self.max_per_class]
        return [ImageFile(f"{split}/{wnid}/{file.name}", file) for file in files]

    def _split(self, *names: str) -> Path:
        for name in names:
            if (self.root / name).is_dir():
                return self.root / name
        raise UserError(
            f"dataset.root={self.root} has no folder {' or '.join(names)}; expected "
            f"{self.root}/train/<class>/* and {self.root}/val/<class>/*"
        )

    def _folders_as_classes(self) -> tuple[ClassInfo, ...]:
        imagenet = {c.wnid: c for c in read_class_list("imagenet1k")}
        names = read_names(self.root / "classes.csv")
        wnids = sorted(
            f.name for f in self._folders["train"].iterdir() if f.is_dir() and f.name[0] != "."
        )
        if not wnids:
            raise UserError(f"dataset.root: {self._folders['train']} has no class folders")
        for wnid in wnids:
            checks.name("dataset.root: a class folder", wnid)
        for folder in names:
            checks.choice(f"a folder in {self.root / 'classes.csv'}", folder, wnids)
        known = (imagenet.get(w, ClassInfo(w, w.replace("_", " "))) for w in wnids)
        return tuple(replace(c, name=names.get(c.wnid, c.name)) for c in known)

    def _require_class_folders(self) -> None:
        for split, folder in self._folders.items():
            missing = [c.wnid for c in self.classes if not (folder / c.wnid).is_dir()]
            if missing:
                loose = (
                    " (its images lie loose: sort them into class folders)"
                    if any(f.suffix.lower() in SUFFIXES for f in folder.iterdir())
                    else ""
                )
                raise UserError(
                    f"dataset={self.name}: {len(missing)} of {len(self.classes)} class folders are "
                    f"missing in {folder}{loose}, the first is {missing[0]}"
                )
            empty = [c.wnid for c in self.classes if not _image_files(folder / c.wnid)]
            if empty:
                raise UserError(
                    f"dataset={self.name}: {folder / empty[0]} holds no image "
                    f"({', '.join(sorted(SUFFIXES))}); {split} needs at least one per class"
                )

    def _glimpse(self, split: str, wnids: Sequence[str]) -> list[Path]:
        return [f for w in wnids for f in _image_files(self._folders[split] / w)]


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")
    )


def _select(
    known: tuple[ClassInfo, ...], wanted: Sequence[str] | Sequence[int] | None
) -> tuple[ClassInfo, ...]:
    if wanted is None:
        return known
    if not isinstance(wanted, list | tuple) or not wanted or len(set(wanted)) != len(wanted):
        raise UserError(f"dataset.classes={wanted!r} must be a list of different classes")
    wanted = [str(key) for key in wanted]
    by_key = {c.wnid: c for c in known} | {c.name: c for c in known}
    for key in wanted:
        checks.choice(
            "dataset.classes", key, [c.wnid for c in known] if key not in by_key else by_key
        )
    return tuple(by_key[key] for key in wanted)

"""The distilled dataset: a folder that anything can write and anything can read.

images/<wnid>/<index:05d>.png    RGB; readable by torchvision's ImageFolder and by Hugging Face's
                                 load_dataset("imagefolder"), as the card says
manifest.json                    classes in label order, configuration, checksums; written last,
                                 so a folder with a manifest is complete
images.sha256                    until then: what was written, so that nothing else is taken for it
README.md                        dataset card

A folder may come from anybody: its manifest is data, and no path in it leads out of the folder.
"""

from __future__ import annotations

import hashlib
import io
import logging
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, Field

from mgd3.data.card import dataset_card
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.decoding import decode
from mgd3.runtime.errors import UserError, reading
from mgd3.runtime.machine import commit
from mgd3.storage.documents import Count, Name, Number, Sha256, read_document, remembered
from mgd3.storage.files import (
    read_file,
    refuse_links,
    remember,
    write_atomic,
    write_json,
    writing,
)

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_JOURNAL = "images.sha256"
_NO_SET = (
    "it is no whole distilled dataset of this project: delete the file and run the command that "
    "made the set, get the set again, or score its images as a folder of your own (docs/data.md)"
)
_PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "scikit-learn", "numpy", "pillow")


class _Class(BaseModel):
    wnid: Name
    name: str
    imagenet_id: int | None = None


class _Image(BaseModel):
    file: str
    wnid: str
    index: Count
    sha256: Sha256
    noise_stream: Annotated[str, Field(pattern=r"^\d{1,19}/[^/]+/\d{1,9}$")] | None = None
    nearest_real: str | None = None
    mass: Annotated[Number, Field(ge=0)] | None = None
    prompt: str | None = None


class _Manifest(BaseModel):
    dataset: Name
    dataset_note: str | None = None
    ipc: Annotated[int, Field(ge=1)]
    seed: Count | None
    method: Name
    role: Literal["random", "full", "unguided"] | None = None
    classes: Annotated[list[_Class], Field(min_length=1)]
    config: dict[str, Any]
    identity: dict[str, Any] | None = None
    data: dict[str, str | None] | None = None
    commit: str | None = None
    elsewhere: bool = False
    images: Annotated[list[_Image], Field(min_length=1)]


class DistilledDataset:
    """A finished folder."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        """`root` is where the images lie, if not in `folder` itself; no manifest can say that."""
        self.folder = folder
        self._root = root

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the folder says of itself; `UserError` if it has no manifest of a set."""
        return self._read()

    def _read(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            manifest = read_document(path, _Manifest, _NO_SET)
        except FileNotFoundError as error:
            raise UserError(
                f"{self.folder} is not a finished distilled dataset: it has no {MANIFEST}"
            ) from error
        wnids = [c["wnid"] for c in manifest["classes"]]
        known = set(wnids)
        stray = next((e for e in manifest["images"] if e["wnid"] not in known), None)
        if stray is not None or len(known) < len(wnids):
            reason = f"{stray['file']} is of no class of it" if stray else "a class is there twice"
            raise UserError(f"{path}: {reason}; {_NO_SET}")
        return {"dataset_note": None, "commit": "unknown"} | manifest

    @cached_property
    def _images_root(self) -> Path:
        """Where the images lie, without a link below it."""
        if self._root is None and self.manifest.get("elsewhere"):
            raise UserError(
                f"the images of {self.folder} lie elsewhere, and only you can say where: score "
                "them with scripts/evaluate.py images=FOLDER"
            )
        root = self._root or self.folder
        refuse_links(root)
        return root

    def path(self, entry: Mapping[str, Any]) -> Path:
        """An image's file; `UserError` for one outside the set's folder, and for links in it."""
        file = PurePosixPath(entry["file"])
        if file.is_absolute() or ".." in file.parts:
            raise UserError(
                f"{self.folder / MANIFEST} names an image outside its folder: {entry['file']!r}; "
                "it is not read. Copy the image into the set, or get the set again"
            )
        return self._images_root / file

    @property
    def identity(self) -> dict[str, Any]:
        """What made the set, by group or key; `UserError` for one of an earlier version."""
        identity, data = (self.manifest.get(key) for key in ("identity", "data"))
        if not isinstance(identity, dict) or not isinstance(data, dict) or "train" not in data:
            raise UserError(
                f"{self.folder} was made by an earlier version of this project, whose manifest "
                "does not say what it was made from: it is left as it is. Make it again, or score "
                "its images/ folder as images of your own (scripts/evaluate.py images=…/images)"
            )
        return dict(identity)

    @property
    def complete(self) -> bool:
        """True once the manifest is written and every file that it lists exists.

        Raises `UserError` for a manifest that is none.
        """
        if not (self.folder / MANIFEST).exists():
            return False
        return all(self.path(entry).is_file() for entry in self.manifest["images"])

    @property
    def generated(self) -> bool:
        """Was every image made from noise, so that none is a copy of somebody's photograph?"""
        return all(entry.get("noise_stream") for entry in self.manifest["images"])

    def files(self) -> dict[str, Path]:
        """The images and the manifest, by their names in the set."""
        images = {entry["file"]: self.path(entry) for entry in self.manifest["images"]}
        return {MANIFEST: self.folder / MANIFEST, **images}

    @property
    def label(self) -> str:
        """A name that no other images share."""
        manifest = self.manifest
        content = "".join(f"{e['file']} {e['sha256']}\n" for e in manifest["images"])
        digest = hashlib.blake2s(content.encode(), digest_size=4).hexdigest()
        return f"{manifest['dataset']}-{manifest['method']}-ipc{manifest['ipc']}-{digest}"

    @property
    def origin(self) -> dict[str, Any]:
        """What a record says of where the images come from."""
        keys = ("dataset", "method", "ipc", "seed", "identity", "data", "commit")
        return {key: self.manifest.get(key) for key in keys}

    def verify(self, cache: Path, workers: int) -> None:
        """`UserError` if an image is missing or differs from its manifest's checksum.

        Every file is read once; `cache` remembers those that did not change since.
        """
        place = hashlib.blake2s(
            str(self._images_root.resolve()).encode(), digest_size=8
        ).hexdigest()
        memory = cache / "inventory" / "sets" / f"{place}.json"
        known = remembered(memory, dict[str, tuple[tuple[int, int], Sha256]])
        entries = self.manifest["images"]
        with ThreadPoolExecutor(workers) as pool:
            seen = dict(pool.map(lambda entry: self._seen(entry, known), entries))
        altered = [e["file"] for e in entries if seen[e["file"]][1] != e["sha256"]]
        if altered:
            raise _altered(self.folder, altered)
        if seen != known:
            remember(memory, seen)

    def _seen(
        self, entry: Mapping[str, Any], known: Mapping[str, tuple[tuple[int, int], str]]
    ) -> tuple[str, tuple[tuple[int, int], str]]:
        """A file's size, time and digest, by name."""
        file, path = entry["file"], self.path(entry)
        try:
            stat = path.stat()
            stamp = stat.st_size, stat.st_mtime_ns
            if file in known and known[file][0] == stamp:
                return file, known[file]
            return file, (stamp, hashlib.sha256(read_file(path)).hexdigest())
        except OSError:
            return file, ((0, 0), "")

    @property
    def ipc(self) -> int:
        """Images per class, of the largest where they differ (the full real set)."""
        return self.manifest["ipc"]

    @property
    def classes(self) -> list[ClassInfo]:
        """Classes in label order."""
        return [ClassInfo(**c) for c in self.manifest["classes"]]

    def images(self) -> Iterator[tuple[Image.Image, int]]:
        """Every image with its label; `UserError` if a file is missing or was altered."""
        labels = {c.wnid: label for label, c in enumerate(self.classes)}
        for entry in self.manifest["images"]:
            yield self.image(entry), labels[entry["wnid"]]

    def image(self, entry: Mapping[str, Any]) -> Image.Image:
        """The image of one of the manifest's entries; `UserError` as `images`."""
        path = self.path(entry)
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise _altered(self.folder, [entry["file"]])
        with reading(path, "replace the image or leave it out"):
            return decode(io.BytesIO(data))

    def mass_weights(self) -> list[float]:
        """What each image counts for: its part of its mode's share of the class, times the IPC.

        Their mean is 1.

        Raises `UserError` for a dataset whose images stand for no modes.
        """
        masses = [entry.get("mass") for entry in self.manifest["images"]]
        if any(mass is None for mass in masses):
            raise UserError(
                f"protocol.image_weights=mass: the images of {self.folder} were made without modes "
                "and have no mass; use protocol.image_weights=none"
            )
        return [mass * self.ipc for mass in masses]


def forget_journal(folder: Path) -> None:
    """Remove the journal of a finished set, whose writer was killed before it could."""
    (folder / _JOURNAL).unlink(missing_ok=True)


def _altered(folder: Path, files: Sequence[str]) -> UserError:
    named = ", ".join(files[:3]) + (" …" if len(files) > 3 else "")
    return UserError(
        f"{len(files)} images of {folder} are missing or differ from the manifest's checksums: "
        f"{named}; put the old ones back, or delete the images and run the same command to make "
        "them again"
    )


class DistilledWriter:
    """Fills a folder image by image; a killed run finds what is done and goes on."""

    def __init__(self, folder: Path, dataset: RealDataset, ipc: int, seed: int) -> None:
        self.folder, self.dataset, self.ipc, self.seed = folder, dataset, ipc, seed
        self._written = self._remembered()

    def _remembered(self) -> dict[str, str]:
        """Digests by file of what earlier runs wrote here: the manifest's, and the journal's."""
        found = {}
        if (self.folder / MANIFEST).is_file():
            entries = DistilledDataset(self.folder).manifest["images"]
            found = {entry["file"]: entry["sha256"] for entry in entries}
        journal = self.folder / _JOURNAL
        if journal.is_file():
            lines = re.finditer(r"^([0-9a-f]{64})  (.+)$", journal.read_text(), re.MULTILINE)
            found |= {file: digest for digest, file in (m.groups() for m in lines)}
        return found

    def has(self, wnid: str, index: int) -> bool:
        """Is this image there, as it was written?"""
        file = _file(wnid, index)
        path = self.folder / file
        if not path.is_file():
            return False
        if hashlib.sha256(path.read_bytes()).hexdigest() == self._written.get(file):
            return True
        log.warning("%s is not what a run has written there: it is made again", path)
        return False

    def write_image(self, wnid: str, index: int, image: Image.Image) -> None:
        """One image as PNG, atomically; its digest is on record before it has its name."""
        buffer, file = io.BytesIO(), _file(wnid, index)
        image.save(buffer, "PNG")
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        if self._written.get(file) != digest:
            self._written[file] = digest
            with writing(self.folder / _JOURNAL):
                self.folder.mkdir(parents=True, exist_ok=True)
                with (self.folder / _JOURNAL).open("a") as journal:  # one write: lines stay whole
                    journal.write(f"\n{digest}  {file}\n")
        write_atomic(self.folder / file, buffer.getvalue())

    def read_image(self, wnid: str, index: int) -> Image.Image:
        """An image that was written."""
        with Image.open(self.folder / _file(wnid, index)) as image:
            return image.convert("RGB")

    def finish(
        self,
        provenance: Mapping[str, Any],
        sources: Mapping[str, Sequence[str]],
        masses: Mapping[str, Sequence[float]] | None = None,
        streams: Mapping[str, Sequence[int]] | None = None,
        prompts: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Write the card and, last, the manifest.

        `provenance` says how the images were made; `sources` names, by wnid, the real image that
        each one was copied from or whose mode it was steered to (empty where there is none);
        `masses` holds the share of the class's real images in modes that each one's mode has,
        `streams` the noise stream that each one was generated from, `prompts` its own prompt.
        """
        images, written = [], self._remembered()  # by all processes
        for info in self.dataset.classes:
            count = len(sources[info.wnid]) if info.wnid in sources else self.ipc
            for index in range(count):
                file = _file(info.wnid, index)
                entry = {
                    "file": file,
                    "wnid": info.wnid,
                    "index": index,
                    "sha256": written[file],
                }
                if streams:
                    entry["noise_stream"] = f"{self.seed}/{info.wnid}/{streams[info.wnid][index]}"
                if info.wnid in sources:
                    entry["nearest_real"] = sources[info.wnid][index]
                if masses and info.wnid in masses:
                    entry["mass"] = masses[info.wnid][index]
                if prompts:
                    entry["prompt"] = prompts[info.wnid][index]
                images.append(entry)
        manifest = {
            "dataset": self.dataset.name,
            "dataset_note": self.dataset.note,
            "ipc": self.ipc,
            "seed": self.seed,
            "classes": [asdict(c) for c in self.dataset.classes],
            **provenance,
            "commit": commit(),
            "versions": {p: version(p) for p in _PACKAGES} | {"python": platform.python_version()},
            "images": images,
        }
        write_atomic(self.folder / "README.md", dataset_card(manifest).encode())
        write_json(self.folder / MANIFEST, manifest)
        forget_journal(self.folder)


def _file(wnid: str, index: int) -> str:
    return f"images/{wnid}/{index:05d}.png"

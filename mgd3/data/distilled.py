"""The distilled dataset: a folder that anything can write and anything can read.

images/<wnid>/<index:05d>.png    RGB; readable by torchvision's ImageFolder and by
                                 Hugging Face's load_dataset("imagefolder")
manifest.json                    classes in label order, configuration, checksums; written last,
                                 so a folder with a manifest is complete
README.md                        dataset card
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.runtime.files import read_json, write_atomic, write_json
from mgd3.runtime.machine import commit

MANIFEST = "manifest.json"
_NEEDED = ("dataset", "classes", "ipc", "method", "images")
_PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "scikit-learn", "numpy", "pillow")


class DistilledDataset:
    """A finished folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the folder says of itself; `UserError` if it has no readable manifest."""
        return self._read()

    def _read(self) -> dict[str, Any]:
        try:
            manifest = read_json(self.folder / MANIFEST)
        except (FileNotFoundError, CorruptFileError) as error:
            raise UserError(
                f"{self.folder} is not a finished distilled dataset: {error}"
            ) from error
        lacking = [k for k in _NEEDED if not isinstance(manifest, dict) or k not in manifest]
        if lacking:
            raise UserError(
                f"{self.folder / MANIFEST} has no {', '.join(lacking)}: it is no distilled dataset "
                "of this project; score its images as a folder of your own (docs/data.md)"
            )
        return manifest

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
        """True once the manifest is written and every file that it lists exists."""
        try:
            manifest = self._read()
        except UserError:
            return False
        return all((self.folder / entry["file"]).is_file() for entry in manifest["images"])

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
            path = self.folder / entry["file"]
            data = path.read_bytes() if path.is_file() else b""
            if hashlib.sha256(data).hexdigest() != self.checksum(entry):
                raise UserError(
                    f"{path} is missing or differs from its manifest's checksum; delete the image "
                    "and run the same command to make it again"
                )
            yield Image.open(io.BytesIO(data)).convert("RGB"), labels[entry["wnid"]]

    def checksum(self, entry: Mapping[str, Any]) -> str:
        """SHA-256 of one image's file; `UserError` for a manifest that holds none."""
        if "sha256" not in entry:
            raise UserError(
                f"{self.folder / MANIFEST} has no checksum of {entry['file']}: it was not written "
                "by this project, or by an early version of it; score the images as a folder of "
                "your own (scripts/evaluate.py) without that manifest"
            )
        return entry["sha256"]

    def mass_weights(self) -> list[float]:
        """What each image counts for: its mode's share of the class, times the IPC (mean 1).

        Raises `UserError` for a dataset whose images stand for no modes.
        """
        masses = [entry.get("mass") for entry in self.manifest["images"]]
        if any(mass is None for mass in masses):
            raise UserError(
                f"protocol.image_weights=mass: the images of {self.folder} were made without modes "
                "and have no mass; use protocol.image_weights=none"
            )
        return [mass * self.ipc for mass in masses]


class DistilledWriter:
    """Fills a folder image by image; a killed run finds what is done and goes on."""

    def __init__(self, folder: Path, dataset: RealDataset, ipc: int, seed: int) -> None:
        self.folder, self.dataset, self.ipc, self.seed = folder, dataset, ipc, seed

    def has(self, wnid: str, index: int) -> bool:
        """Is this image there and whole?"""
        path = self.folder / _file(wnid, index)
        try:
            with Image.open(path) as image:
                image.verify()  # every chunk and its CRC
        except (OSError, SyntaxError):  # Pillow's words for absent and for damaged
            return False
        return True

    def write_image(self, wnid: str, index: int, image: Image.Image) -> None:
        """One image as PNG, atomically."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        write_atomic(self.folder / _file(wnid, index), buffer.getvalue())

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
    ) -> None:
        """Write the card and, last, the manifest.

        `provenance` says how the images were made; `sources` names, by wnid, the real image that
        each one was copied from or whose mode it was steered to (empty where there is none);
        `masses` holds the share of the class's real images that each one's mode stands for,
        `streams` the noise stream that each one was generated from.
        """
        images = []
        for info in self.dataset.classes:
            count = len(sources[info.wnid]) if info.wnid in sources else self.ipc
            for index in range(count):
                file = _file(info.wnid, index)
                entry = {
                    "file": file,
                    "wnid": info.wnid,
                    "index": index,
                    "sha256": hashlib.sha256((self.folder / file).read_bytes()).hexdigest(),
                }
                if streams:
                    entry["noise_stream"] = f"{self.seed}/{info.wnid}/{streams[info.wnid][index]}"
                if info.wnid in sources:
                    entry["nearest_real"] = sources[info.wnid][index]
                if masses and info.wnid in masses:
                    entry["mass"] = masses[info.wnid][index]
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
        write_atomic(self.folder / "README.md", _card(manifest).encode())
        write_json(self.folder / MANIFEST, manifest)


def _file(wnid: str, index: int) -> str:
    return f"images/{wnid}/{index:05d}.png"


def _card(manifest: Mapping[str, Any]) -> str:
    classes = "\n".join(
        f"| {label} | `{c['wnid']}` | {c['name']} |" for label, c in enumerate(manifest["classes"])
    )
    count = len(manifest["images"])
    note = f"\n**Note:** {manifest['dataset_note']}.\n" if manifest["dataset_note"] else ""
    method = manifest["method"]
    return f"""---
task_categories: [image-classification]
tags: [dataset-distillation]
configs:
- config_name: default
  data_files: images/**/*.png
---
# {manifest["dataset"]}, {manifest["ipc"]} images per class, {method}

{count} training images of {len(manifest["classes"])} classes, made by `{method}` with seed
{manifest["seed"]}. `manifest.json` holds the full configuration, versions and checksums.
{note}
```python
torchvision.datasets.ImageFolder("images")
datasets.load_dataset("imagefolder", data_dir="images")
```

Both number the classes in sorted order; the benchmark's order is

| label | folder | name |
|---|---|---|
{classes}

## Configuration

```json
{json.dumps(manifest["config"], indent=2)}
```
"""

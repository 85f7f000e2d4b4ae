"""Where parquet tables of images come from: a folder, or a repository of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgd3.data.layouts.trees import TRAIN, VAL
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.storage.documents import remembered
from mgd3.storage.files import write_json
from mgd3.storage.repositories import (
    HUB,
    HubFile,
    hub_reachable,
    published_files,
    require_repository,
    talking,
)

_SPLITS = {"train": TRAIN, "validation": VAL, "valid": VAL, "val": VAL, "test": VAL}
_SHARD = re.compile(r"(?:^|/)(train|validation|valid|val|test)(?:[-_.][^/]*|/[^/]*)?\.parquet$")
_PLACES = ("*.parquet", "data/*.parquet", *(f"{split}/*.parquet" for split in _SPLITS))
_COMMIT = ".commit.json"  # which state of a repository they are from


@dataclass(frozen=True)
class Source:
    """What hf://USER/NAME[@REVISION][/FOLDER] names."""

    repository: str
    revision: str | None
    folder: str


@dataclass(frozen=True)
class Tables:
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


def source_of(root: str) -> Source:
    """The parts of a hub's address; `UserError` for what is none."""
    user, _, rest = _typed(root).partition("/")
    name, _, folder = rest.partition("/")
    name, at, revision = name.partition("@")
    form = "dataset.root=hf://USER/NAME[@REVISION][/FOLDER], the"
    require_repository(f"{form} repository", f"{user}/{name}")
    for part in [revision] * bool(at) + folder.split("/") * bool(folder):
        checks.name(f"{form} revision and each folder", part)
    return Source(f"{user}/{name}", revision or None, folder)


def _typed(root: str) -> str:
    return root.removeprefix(HUB).removeprefix("datasets/").strip("/")


def name_of(root: str) -> str:
    """What the folder of a source is called: by what was typed, or by what the files are."""
    if root.startswith(HUB):
        return _typed(root).replace("/", "--")
    folder = Path(root).expanduser().resolve()
    stats = [(name, (folder / name).stat().st_size) for name in _local_names(folder)]
    digest = hashlib.blake2s(repr((str(folder), stats)).encode(), digest_size=6).hexdigest()
    return f"{folder.name[:60]}-{digest}"


def _local_names(folder: Path) -> list[str]:
    found = [str(p.relative_to(folder)) for pattern in _PLACES for p in folder.glob(pattern)]
    return sorted(n for n in found if _SHARD.search(n) and (folder / n).is_file())


def of_folder(root: str) -> Tables:
    """The shards of a folder."""
    folder = Path(root).expanduser()
    files = [HubFile(name, (folder / name).stat().st_size) for name in _local_names(folder)]
    return Tables(str(folder), _by_split(str(folder), files), folder)


def of_hub(root: str, source: Source, place: Path) -> Tables:
    """The shards of a repository, at the commit that came first."""
    if not hub_reachable():
        raise UserError(
            f"dataset.root={root}: the hub cannot be reached, or HF_HUB_OFFLINE is set, and not "
            f"all wanted classes are in {place}"
        )
    from huggingface_hub import HfApi

    first = remembered(place / _COMMIT, dict[str, str]).get("commit")
    with talking(f"dataset.root={root} could not be looked at"):
        info = HfApi().dataset_info(
            source.repository, revision=first or source.revision, files_metadata=True
        )
    commit = str(info.sha)
    files = [
        f
        for f in published_files(info.siblings)
        if f.name.startswith(f"{source.folder}/" if source.folder else "")
        and f.name.endswith(".parquet")
    ]
    shards = _by_split(root, files)
    write_json(place / _COMMIT, {"commit": commit})
    return Tables(root, shards, None, source.repository, commit)


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
            f"dataset.root={root} holds several tables ({_listed(folders)}): add the "
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


def _listed(folders: Iterable[str]) -> str:
    return ", ".join(f"{folder or '.'}/" for folder in sorted(folders))

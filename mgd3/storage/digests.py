"""What files hold: their SHA-256, looked up by size and time where it was taken before."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from mgd3.storage.documents import Sha256, remembered
from mgd3.storage.files import remember

_CHUNK = 1 << 20


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    return digest_of(path, "sha256")


def digest_of(path: Path, kind: str) -> str:
    """Hex digest of a file by hashlib's name of its kind, read in pieces."""
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def stamp_digest(path: Path) -> str:
    """Identifies a large file that is not worth reading: by place, size and time of change."""
    stat = path.stat()
    text = f"{path.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
    return hashlib.blake2s(text.encode(), digest_size=8).hexdigest()


def content_digest(path: Path, memory: Path) -> str:
    """SHA-256 of a file; remembered in `memory` by place, size and time of change."""
    stamp = stamp_digest(path)
    known = remembered(memory, dict[str, Sha256])
    if stamp not in known:
        known[stamp] = sha256_of(path)
        remember(memory, known)
    return known[stamp]


def content_digests(paths: Mapping[str, Path], cache: Path) -> dict[str, str]:
    """`content_digest` of files, and one of each folder, by key; remembered below `cache`."""
    memory = cache / "inventory" / "weights.json"
    return {
        key: folder_digest(path, memory) if path.is_dir() else content_digest(path, memory)
        for key, path in paths.items()
    }


def folder_digest(folder: Path, memory: Path | None = None) -> str:
    """SHA-256 of the names and contents of all files below a folder that are not hidden."""
    held, been = {}, set()
    for place, folders, files in os.walk(folder, followlinks=True):
        inside = [] if os.path.realpath(place) in been else folders  # a link may lead back
        been.add(os.path.realpath(place))
        folders[:] = [name for name in inside if not name.startswith(".")]
        for path in (Path(place, name) for name in files if not name.startswith(".")):
            name = path.relative_to(folder).as_posix()
            if path.is_file():  # no link to nothing
                held[name] = content_digest(path, memory) if memory else sha256_of(path)
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

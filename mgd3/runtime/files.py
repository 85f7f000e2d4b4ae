"""Files that a run leaves: written whole or not at all, checked when they are read."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mgd3.runtime.errors import CorruptFileError, UserError

log = logging.getLogger(__name__)

_TEMPORARY = ".tmp"
_PROJECT = Path(__file__).resolve().parents[2]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into errors for people."""
    try:
        yield
    except OSError as error:
        reasons = {
            errno.ENOSPC: "the disk is full; free some space and run the same command to go on",
            errno.EDQUOT: "your disk quota is used up; free some space and run the same command",
            errno.EACCES: "no permission to write there; choose another folder",
            errno.EPERM: "no permission to write there; choose another folder",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.ENOTDIR: "a file is in the way of a folder",
            errno.EEXIST: "a file is in the way of a folder",
        }
        if error.errno not in reasons:
            raise
        raise UserError(f"cannot write {path}: {reasons[error.errno]}") from error


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` whole: a temporary file beside it, flushed, then renamed."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY
        )
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def remove_leftovers(*folders: Path) -> None:
    """Delete what killed writers left in `folders`; call it only while holding their lock."""
    for folder in folders:
        for path in folder.glob(f".*{_TEMPORARY}"):
            path.unlink(missing_ok=True)


def remove_leftovers_of(path: Path) -> None:
    """Delete what killed writers left beside one file; only while holding its lock."""
    for leftover in path.parent.glob(f".{path.name}.*{_TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Parsed JSON; `CorruptFileError` if it is not."""
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CorruptFileError(f"{path} is not valid JSON") from error


def stamp_digest(path: Path) -> str:
    """Identifies a large file that is not worth reading: by place, size and time of change."""
    stat = path.stat()
    text = f"{path.resolve()}/{stat.st_size}/{stat.st_mtime_ns}"
    return hashlib.blake2s(text.encode(), digest_size=8).hexdigest()


def content_digest(path: Path, memory: Path) -> str:
    """SHA-256 of a file; remembered in `memory` by place, size and time of change."""
    stamp = stamp_digest(path)
    try:
        known = read_json(memory)
    except (FileNotFoundError, CorruptFileError):
        known = {}
    if stamp not in known:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        known[stamp] = digest.hexdigest()
        write_json(memory, known)
    return known[stamp]


def content_digests(paths: Mapping[str, Path], cache: Path) -> dict[str, str]:
    """`content_digest` of files by key, remembered below `cache`."""
    memory = cache / "inventory" / "weights.json"
    return {key: content_digest(path, memory) for key, path in paths.items()}


def local_path(value: str) -> Path | None:
    """The file or folder that a value names, from here or from the project's root; else None."""
    path = Path(value).expanduser()
    try:
        return next((p for p in (path, _PROJECT / path) if p.exists()), None)
    except OSError:  # a name that no file system takes
        return None


@contextmanager
def nothing_left_behind(run_dir: Path) -> Iterator[None]:
    """Remove a run's folder again if the run is refused before it has written anything."""
    try:
        yield
    except UserError:
        if run_dir.is_dir() and all(
            f.name == ".hydra" or f.suffix == ".log" for f in run_dir.iterdir()
        ):
            shutil.rmtree(run_dir)
            above = {Path.cwd(), *Path.cwd().parents}  # not ours, even if empty
            for parent in run_dir.absolute().parents:
                mine = parent.is_relative_to(Path.cwd()) and parent not in above
                if not mine or any(parent.iterdir()):
                    break
                parent.rmdir()
        raise


@contextmanager
def exclusive(folder: Path, patient: bool = False) -> Iterator[None]:
    """Hold a run's folder for this process; a second one is refused or, if `patient`, waits."""
    lock = _lock(folder / ".run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy = f"another process is running this very configuration in {folder}"
        if not patient:
            raise UserError(
                f"{busy}; wait for it, or give this run its own folder with hydra.run.dir=FOLDER"
            ) from None
        log.info("%s; waiting for it", busy)
        lock.acquire()
    with lock:
        yield


@contextmanager
def waiting(folder: Path, name: str = "") -> Iterator[None]:
    """Take turns at what several runs share: whoever comes second finds it there.

    `name` is a part of the folder that is made on its own; without it, the folder is one thing.
    """
    lock = _lock(folder / f".{name}.lock" if name else folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("another process is filling %s; waiting for it", folder / name)
        lock.acquire()
    with lock:
        yield


def _lock(path: Path) -> FileLock:
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return FileLock(path)

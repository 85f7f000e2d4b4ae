"""Files that a run leaves: written whole or not at all, checked when they are read."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import AcquireReturnProxy, FileLock, Timeout

from mgd3.runtime.errors import CorruptFileError, UserError, reading

log = logging.getLogger(__name__)

_TEMPORARY = ".mgd3.tmp"  # and nobody else's, so that a leftover can be deleted anywhere
RUN_LOCK = ".run.lock"
REFUSALS = {  # what a file system says no with, and what its user can do
    errno.ENOSPC: "the disk is full; free some space and run the same command to go on",
    errno.EDQUOT: "your disk quota is used up; free some space and run the same command",
    errno.EFBIG: "files may not be so large here (ulimit -f); raise the limit, or choose another "
    "file system, and run the same command to go on",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.EACCES: "no permission; choose another folder",
    errno.EPERM: "no permission; choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.ENOTDIR: "a file is in the way of a folder",
    errno.EEXIST: "a file is in the way of a folder",
    errno.EISDIR: "a folder is in the way of a file; move it away",
    errno.ENOTEMPTY: "a folder is in the way of a file; move it away",
    errno.ELOOP: "its links lead in a circle; mend them",
    errno.EMFILE: "too many files are open (ulimit -n); raise the limit",
    errno.EIO: "the device reports an error; check the disk",
    errno.ESTALE: "the network file system has lost it; run the same command again",
}
_PROJECT = Path(__file__).resolve().parents[2]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into errors for people."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSALS and error.errno != errno.ENOENT:
            raise
        reason = REFUSALS.get(error.errno or 0, "no such place can be made; choose another folder")
        raise UserError(f"cannot write {path}: {reason}") from error


def write_atomic(path: Path, data: bytes, flush: bool = True) -> None:
    """Write `data` to `path` whole: a temporary file beside it, flushed, then renamed.

    Without `flush` a power cut may lose it: for one of many files, flushed together by the caller.
    """
    with whole_file(path, flush) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path, flush: bool = True) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block ends; nothing, if it fails.

    It stays locked while it is written, so that `remove_leftovers` tells it from a dead one.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, temporary = _temporary(path)
        try:
            with file:
                yield file
                file.flush()
                if flush:
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o644)
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _temporary(path: Path) -> tuple[BinaryIO, Path]:
    while True:
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name[:60]}.", suffix=_TEMPORARY
        )
        with suppress(OSError):  # a file system without locks: leftovers there stay
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:  # else taken for a dead one before it was locked
            return os.fdopen(handle, "wb"), Path(name)
        os.close(handle)


def remove_leftovers(*folders: Path, deep: bool = True) -> None:
    """Delete the temporary files of dead writers in `folders` and, if `deep`, below them."""
    for folder in folders:
        for path in folder.glob(f"{'**/' if deep else ''}.*{_TEMPORARY}"):
            with suppress(OSError), path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer holds it while alive
                path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_file(path: Path) -> bytes:
    """A file's bytes; `OSError` for a FIFO or a device, which could be read for ever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file")
    return path.read_bytes()


def refuse_links(folder: Path) -> None:
    """`UserError` for a link below a folder that may be anybody's: it could lead out of it."""
    for place, folders, files in os.walk(folder):
        if "wandb" in folders:
            folders.remove("wandb")  # a record's of an earlier version: nothing of ours is there
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink():
                raise UserError(
                    f"{path} is a link, and links below {folder} are not followed: put the file or "
                    "folder itself there"
                )


def remember(path: Path, value: Any) -> None:
    """`write_json` of what only saves time: in a folder of somebody else's it is not kept."""
    try:
        write_json(path, value)
    except UserError as error:
        log.debug("not remembered: %s", error)


def read_json(path: Path) -> Any:
    """Parsed JSON of ours; `FileNotFoundError`, or `CorruptFileError` if it cannot be read."""
    with reading(path, "it is no JSON of ours", CorruptFileError):
        return json.loads(read_file(path))


def local_path(value: str) -> Path | None:
    """The file or folder that a value names, from here or from the project's root; else None."""
    path = Path(value).expanduser()
    try:
        return next((p for p in (path, _PROJECT / path) if p.exists()), None)
    except OSError:  # a name that no file system takes
        return None


@contextmanager
def nothing_left_behind(run_dir: Path, runs: Path) -> Iterator[None]:
    """Remove a run's folder again if the run fails before it has written anything.

    Only one that is empty before, and that no other process has begun to work in; with it, empty
    ones above it that lie below `runs` or the working directory.
    """
    was_empty = not any(run_dir.iterdir())
    try:
        yield
    except BaseException:
        inside = list(run_dir.iterdir()) if was_empty and run_dir.is_dir() else []
        mine = all(f.suffix == ".log" or f.name == RUN_LOCK for f in inside)
        if was_empty and run_dir.is_dir() and not run_dir.is_symlink() and mine and _free(run_dir):
            for path in (*inside, run_dir / RUN_LOCK):  # which looking at the lock has made
                path.unlink(missing_ok=True)
            remove_empty(run_dir, runs)
        raise


def remove_empty(folder: Path, runs: Path = Path()) -> None:
    """Remove an empty folder, and those above it that are then empty, below `runs` or here."""
    above = {Path.cwd(), *Path.cwd().parents}  # not ours, even if empty
    for place in (folder.absolute(), *folder.absolute().parents):
        if place in above or not place.is_dir() or place.is_symlink() or any(place.iterdir()):
            break
        place.rmdir()
        if not any(top in place.parent.parents for top in (Path.cwd(), runs.absolute())):
            break


def _free(folder: Path) -> bool:
    """Does no process hold the folder?"""
    try:
        with _acquired(_lock(folder / RUN_LOCK), timeout=0):
            return True
    except Timeout:
        return False


@contextmanager
def exclusive(folder: Path, patient: bool = False) -> Iterator[None]:
    """Hold a run's folder for this process; a second one is refused or, if `patient`, waits."""
    lock = _lock(folder / RUN_LOCK)
    try:
        _acquired(lock, timeout=0)
    except Timeout:
        busy = f"another process is running this very configuration in {folder}"
        if not patient:
            raise UserError(
                f"{busy}; wait for it, or give this run its own folder with hydra.run.dir=FOLDER"
            ) from None
        log.info("%s; waiting for it", busy)
        _acquired(lock)
    with lock:
        yield


@contextmanager
def waiting(folder: Path, name: str = "") -> Iterator[None]:
    """Take turns at what several runs share: whoever comes second finds it there.

    `name` is a part of the folder that is made on its own; without it, the folder is one thing.
    """
    lock = _lock(folder / f".{name}.lock" if name else folder / ".lock")
    try:
        _acquired(lock, timeout=0)
    except Timeout:
        log.info("another process is filling %s; waiting for it", folder / name)
        _acquired(lock)
    with lock:
        yield


def _acquired(lock: FileLock, timeout: float = -1) -> AcquireReturnProxy:
    """The lock, held; `UserError` on a file system that has none, where runs could meet unseen."""
    try:
        return lock.acquire(timeout=timeout)
    except (OSError, NotImplementedError) as error:
        if isinstance(error, Timeout) or not _has_no_locks(error):
            raise
        raise UserError(
            f"{Path(lock.lock_file).parent} lies on a file system without locks, which keep two "
            "runs from writing the same files: choose another folder (runs=, cache=)"
        ) from error


def _has_no_locks(error: Exception) -> bool:
    if isinstance(error, NotImplementedError):
        return True
    return getattr(error, "errno", None) in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def _lock(path: Path) -> FileLock:
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return FileLock(path)

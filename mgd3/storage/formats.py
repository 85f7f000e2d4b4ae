"""What a file is, by its first bytes: weights in a format that is read, or something else."""

from __future__ import annotations

import pickletools
import re
import tarfile
import zipfile
from pathlib import Path

SAFETENSORS, ZIP, PICKLE = "safetensors", "zip", "pickle"  # the last two: torch.save's

_HEAD = 512  # bytes that are looked at
_LONGEST = 100_000_000  # bytes of a safetensors header
_SHOWN = 40  # characters of a text
_ZIP_START = b"PK\x03\x04"  # what torch goes by, too
_TORCH_NUMBER = b"\xfc\x9cF\xf9 j\xa8P\x19"  # with which torch's older format begins
_CUT = 32  # a pickle's beginning that may have been torch's
_AGAIN = "fetch it again"
_UNPACK = "unpack it and give the weight file inside"
_EXPORT = "save its tensors as safetensors where its own program can read it"
_GIVE = (
    "give a safetensors file or one that torch.save wrote; if this should be one, fetch it again"
)

# How other files begin, what they are, and what to do
_OTHERS = (
    (rb"\x1f\x8b", "a gzip archive", _UNPACK),
    (rb"BZh[1-9]1AY&SY", "a bzip2 archive", _UNPACK),
    (rb"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (rb"\x28\xb5\x2f\xfd", "a zstandard archive", _UNPACK),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (rb"\x93NUMPY", "a Numpy array", _EXPORT),
    (rb"\x89HDF\r\n", "an HDF5 file", _EXPORT),
    (rb"GGUF", "a GGUF file", _EXPORT),
)


class NoWeightsError(Exception):
    """A file that gives no weights: its message says what the file is, `remedy` what to do."""

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(found)
        self.remedy = remedy


def format_of(path: Path) -> str:
    """`SAFETENSORS`, `ZIP` or `PICKLE`, whatever the suffix; nothing is unpickled.

    Raises `NoWeightsError` for any other file, `OSError` for one that cannot be opened.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if head.startswith(_ZIP_START):
        _refuse_other_zips(path)
        return ZIP
    if _is_safetensors(head):
        return SAFETENSORS
    _refuse_fragments(head, path.stat().st_size)
    for start, what, remedy in _OTHERS:
        if re.match(start, head):
            raise NoWeightsError(f"it is {what}", remedy)
    if tarfile.is_tarfile(path):  # before torch looks: its oldest format was a tar archive
        raise NoWeightsError("it is a tar archive", _UNPACK)
    if _is_pickle(head):
        return PICKLE
    _refuse_texts(head)
    raise NoWeightsError(f"it begins with {head[:8]!r}, as no weight file does", _GIVE)


def _is_safetensors(head: bytes) -> bool:
    """Eight bytes of the header's length, then a JSON object."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST


def _refuse_fragments(head: bytes, size: int) -> None:
    """What has not been fetched, or only its beginning."""
    if not head:
        raise NoWeightsError("it is empty", _AGAIN)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise NoWeightsError(
            f"it is a Git-LFS pointer of {size} bytes, not the file that it stands for",
            f"run git lfs pull where it was cloned, or {_AGAIN}",
        )
    if size <= 8:
        raise NoWeightsError(f"it has no more than {size} bytes", _AGAIN)
    if not any(head):
        raise NoWeightsError("it begins with zeros, as a file that was never filled", _AGAIN)


def _is_pickle(head: bytes) -> bool:
    """Is it torch's older format, or so short that it may have been?

    Raises `NoWeightsError` for other pickles.
    """
    if _TORCH_NUMBER in head[:_CUT]:
        return True
    newer = re.match(rb"\x80[\x02-\x05]", head) is not None
    if newer and len(head) < _CUT:
        return True
    if newer or _is_whole_pickle(head):
        raise NoWeightsError("it is a pickle, but not as torch.save writes one", _EXPORT)
    return False


def _is_whole_pickle(head: bytes) -> bool:
    """Is it a short pickle of the first protocols, which are text?"""
    try:
        return len(list(pickletools.genops(head))) > 2
    except Exception:  # whatever pickletools raises for other content
        return False


def _refuse_texts(head: bytes) -> None:
    """Pages and answers that arrived in place of a file."""
    text = head.decode("utf-8-sig", errors="ignore").strip()
    start = text.lower()
    if start.startswith("<") and ("<html" in start or "<!doctype html" in start):
        raise NoWeightsError(
            "it is an HTML page",
            "its address answered with a page, of an error or to sign in: fetch the file itself",
        )
    if not all(c.isprintable() or c.isspace() for c in text) or not _is_utf8(head):
        return
    if start.startswith(("{", "[")):
        raise NoWeightsError("it is a JSON text", "give the weight file that it belongs to")
    line = text.splitlines()[0] if text else ""
    raise NoWeightsError(f"it is a text that begins {line[:_SHOWN]!r}", _GIVE)


def _is_utf8(head: bytes) -> bool:
    """Do these bytes decode, but for a character that the end may cut?"""
    for cut in range(4):
        try:
            head[: len(head) - cut].decode()
            return True
        except UnicodeDecodeError:
            continue
    return False


def zip_entries(path: Path) -> list[zipfile.ZipInfo]:
    """A zip's entries as Python's reader lists them; none where it cannot.

    torch's reader is content with more files than Python's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, OSError):
        return []


def _refuse_other_zips(path: Path) -> None:
    """`NoWeightsError` for a whole archive without a pickle: torch always writes one."""
    names = [entry.filename for entry in zip_entries(path)]
    if not names or any(name.endswith(".pkl") for name in names):
        return
    if all(name.endswith(".npy") for name in names):
        raise NoWeightsError("it is a Numpy archive", _EXPORT)
    raise NoWeightsError("it is a zip archive that torch.save did not write", _UNPACK)

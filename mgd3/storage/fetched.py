"""Where downloads lie, and what each was when it first came (trust on first use)."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from urllib.parse import urlparse

from mgd3.runtime.errors import UserError
from mgd3.storage.files import waiting, write_json

_PROJECT = Path(__file__).resolve().parents[2]
_REMEDY = "delete it: what is fetched next is then trusted anew"


def is_url(value: str) -> bool:
    """An address on the web?"""
    return value.startswith(("https://", "http://"))


def download_folder() -> Path:
    """Where `scripts/fetch_weights.py` puts what it fetches from addresses."""
    return Path(os.environ.get("MGD3_WEIGHTS") or _PROJECT / "weights").expanduser()


def download_path(url: str) -> Path:
    """Where an https address is put, and where a run looks for it.

    Raises `UserError` for an address that names no file.
    """
    address = urlparse(url)
    name = Path(address.path.lstrip("/"))
    if not name.name or ".." in name.parts:
        raise UserError(f"{url} does not name a file")
    if address.query:  # another query is another file
        digest = hashlib.blake2s(address.query.encode(), digest_size=4).hexdigest()
        name = name.with_name(f"{digest}-{name.name}")
    return download_folder() / address.netloc.replace(":", "_") / name


def recorded_digest(address: str) -> str | None:
    """The SHA-256 that an address had when it was first fetched, None for one that never was."""
    return _digests().get(_public(address))


def record_digest(address: str, digest: str) -> Path:
    """Remember what an address holds; returns the file that does."""
    with waiting(download_folder(), "digests"):
        write_json(_place(), _digests() | {_public(address): digest})
    return _place()


def _digests() -> dict[str, str]:
    from mgd3.storage.documents import Sha256, read_document  # pydantic: not for --help

    try:
        return read_document(_place(), dict[str, Sha256], _REMEDY)
    except FileNotFoundError:
        return {}


def _public(address: str) -> str:
    """An address without what lets somebody in: user, password, query."""
    parts = urlparse(address)
    host = parts.netloc.rpartition("@")[2]
    query = hashlib.blake2s(parts.query.encode(), digest_size=4).hexdigest() if parts.query else ""
    return f"{parts.scheme}://{host}{parts.path}{'?' if query else ''}{query}"


def _place() -> Path:
    return download_folder() / "digests.json"

"""Fetching weights: from an https address, or a repository of the Hugging Face hub.

Broken transfers go on where they stopped; what arrives is checked against the published size and
SHA-256 before anything takes its place.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urldefrag

from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.runtime.progress import progress
from mgd3.storage.digests import sha256_of
from mgd3.storage.fetched import record_digest, recorded_digest
from mgd3.storage.files import read_json, waiting, write_json, writing

log = logging.getLogger(__name__)

PARTS = ("transformer", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
_CHUNK = 1 << 20
_TRIES = 5  # in a row without a byte
_SECONDS = 30.0  # without an answer
_TRANSIENT = (408, 429, 500, 502, 503, 504)


def fetch_url(url: str, path: Path, patience: float = 1.0, insecure: bool = False) -> None:
    """Fetch `url` to `path`; `url#sha256=HEX` is checked. Raises `UserError` if it cannot be had.

    Without a SHA-256 it must be the one that came first, if `trust` remembers one. Plain http
    needs a SHA-256 or `insecure`.

    Bytes gather in a `.part` file beside `path`; another process that wants the same file waits.
    `patience` is the first wait in seconds after a failure; it doubles.
    """
    address, fragment = urldefrag(url)
    expected = parse_qs(fragment).get("sha256", [""])[0].lower()
    if address.startswith("http://") and not (expected or insecure):
        raise UserError(
            f"{address}: whoever carries plain http can change what arrives; give its checksum "
            "(sha256=HEX), an https address, or insecure=true to take what comes"
        )
    part = path.with_name(f".{path.name}.part")
    with waiting(path.parent):
        if path.is_file():
            _memory(part).unlink(missing_ok=True)  # of a process that was killed before it could
            _check(address, expected, path)
            return
        _gather(address, part, path.name, patience)
        try:
            _check(address, expected, part)
        except UserError as error:
            part.unlink()
            _memory(part).unlink(missing_ok=True)
            raise UserError(f"{error}; what came was thrown away") from error
        with writing(path):
            part.replace(path)
        _memory(part).unlink(missing_ok=True)


def _check(address: str, expected: str, path: Path) -> None:
    """`UserError` unless a file has the digest that was asked for, or that came the first time."""
    digest, first = sha256_of(path), recorded_digest(address)
    if expected and digest != expected:
        raise UserError(f"{address}: {path} has the SHA-256 {digest}, not {expected}: delete it")
    if not expected and first not in (None, digest):
        raise UserError(
            f"{address}: {path} has the SHA-256 {digest}, but what came first had {first}; find "
            f"out which one is right and give it as sha256=HEX"
        )


def trust(url: str, path: Path) -> None:
    """Remember what an address gave: a later file that differs is refused."""
    address, fragment = urldefrag(url)
    digest = sha256_of(path)
    if recorded_digest(address) == digest:
        return
    place = record_digest(address, digest)
    if not fragment:
        log.warning(
            "no checksum of %s is published: trusting what came, SHA-256 %s, recorded in %s",
            *(address, digest, place),
        )


def _gather(address: str, part: Path, name: str, patience: float) -> None:
    """Connect again and again until `part` is whole."""
    failures = most = 0
    while True:
        try:
            return _transfer(address, part, name)
        except urllib.error.HTTPError as error:
            reason: Exception = error
            if error.code not in _TRANSIENT:
                raise UserError(
                    f"{address}: the server answers {error.code} {error.reason}"
                ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        arrived = part.stat().st_size if part.is_file() else 0
        failures = 0 if arrived > most else failures + 1
        most = max(most, arrived)
        if failures == _TRIES:
            kept = "what has arrived is kept: " if _version(part) else ""
            raise UserError(
                f"{address} could not be fetched, {_TRIES} attempts in a row failed at "
                f"{arrived / 1e6:.1f} MB ({reason}); {kept}try the same command again later"
            ) from reason
        log.warning("%s: %s; trying again from %.1f MB", address, reason, arrived / 1e6)
        time.sleep(patience * 2**failures)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to http."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        if req.full_url.startswith("https://") and not newurl.startswith("https://"):
            raise UserError(
                f"{req.full_url} leads to {newurl}, which is not encrypted: not followed; give "
                "that address itself with its sha256=HEX if you trust it"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_Redirects)


def _transfer(address: str, part: Path, name: str) -> None:
    """One connection; raises `OSError` or `HTTPException` unless the file is whole afterwards."""
    version = _version(part) if part.is_file() else ""
    offset = part.stat().st_size if version else 0
    request = urllib.request.Request(address)
    if offset:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", version)
    try:
        answer = _OPENER.open(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:  # nothing is left to send
            return
        raise
    with answer:
        if answer.status != 206:
            offset = 0
            part.unlink(missing_ok=True)  # before its version is forgotten
            write_json(_memory(part), {"version": _validator(answer.headers)})
        left = int(answer.headers.get("Content-Length") or 0)
        with (
            writing(part),
            part.open("ab") as file,
            progress(f"fetching {name}, MB", round((offset + left) / 1e6)) as advance,
        ):
            advance(round(offset / 1e6))
            arrived = 0
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                arrived += len(chunk)
                advance(len(chunk) / 1e6)
    if left and arrived < left:
        raise ConnectionError(f"the connection ended {left - arrived} bytes early")


def _validator(headers: Message) -> str:
    """What `If-Range` accepts: a strong ETag, else the date."""
    etag = headers.get("ETag") or ""
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified") or ""


def _memory(part: Path) -> Path:
    """Which version of the file has arrived in `part`."""
    return part.with_name(f"{part.name}.json")


def _version(part: Path) -> str:
    try:
        return read_json(_memory(part))["version"]
    except (FileNotFoundError, CorruptFileError, KeyError):
        return ""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub publishes it."""

    name: str
    size: int
    sha256: str | None  # of large files only
    git_id: str | None = None  # of the others: the SHA-1 of git's blob


def fetch_repository(repository: str, parts: Sequence[str] = PARTS) -> Path:
    """Fetch what a run reads of a hub repository into the hub's cache; returns its folder.

    Of a pipeline, the folders `parts`; of anything else, its own files. Safetensors where there
    are some, never half-precision copies.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        published = HfApi().model_info(repository, files_metadata=True).siblings or []
        files = [
            HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
            for s in published
        ]
        wanted = needed_files(files, parts)
        if not wanted:
            raise UserError(f"{repository} on the hub holds no weights that this project reads")
        return _snapshot(repository, wanted)
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set: unset it to fetch from the hub") from error
    except Exception as error:  # the client's HTTP library, and its errors, changed over versions
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{repository} could not be fetched from the hub ({reason}); what has arrived is kept: "
            "try the same command again later"
        ) from error


def _snapshot(repository: str, wanted: Sequence[HubFile]) -> Path:
    """Download `wanted` and verify each file; returns their folder.

    An altered file is downloaded once more, then thrown away with `UserError`.
    """
    from huggingface_hub import snapshot_download

    for file in wanted:
        log.info("%s/%s, %.1f MB", repository, file.name, file.size / 1e6)
    folder = Path(snapshot_download(repository, allow_patterns=[f.name for f in wanted]))
    altered = [f for f in wanted if not _is_whole(folder / f.name, f)]
    if altered:
        names = [f.name for f in altered]
        snapshot_download(repository, allow_patterns=names, force_download=True)
        altered = [f for f in altered if not _is_whole(folder / f.name, f)]
    for file in altered:
        (folder / file.name).resolve().unlink()
    if altered:
        raise UserError(
            f"{', '.join(f'{repository}/{f.name}' for f in altered)} arrived with another size or "
            "checksum than the hub publishes, twice; it was thrown away: try again later"
        )
    return folder


def needed_files(files: Sequence[HubFile], parts: Sequence[str]) -> list[HubFile]:
    """Configurations, vocabularies and one form of the weights, of each folder that is read."""
    is_pipeline = any(f.name == "model_index.json" for f in files)
    folders = list(parts) if is_pipeline else ["."]
    chosen = [f for f in files if f.name == "model_index.json"]
    for folder in folders:
        inside = [f for f in files if str(Path(f.name).parent) == folder]
        weights = [f for f in inside if "fp16" not in f.name and "non_ema" not in f.name]
        safe = [f for f in weights if f.name.endswith(".safetensors")]
        pickled = [f for f in weights if f.name.endswith(".bin")]
        chosen += [f for f in inside if f.name.endswith((".json", ".txt"))] + (safe or pickled)
    return list(dict.fromkeys(chosen))


def _is_whole(path: Path, file: HubFile) -> bool:
    if file.size and path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return sha256_of(path) == file.sha256
    if file.git_id is None:
        return True
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.git_id

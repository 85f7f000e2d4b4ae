"""Fetching a file from an address: broken transfers go on where they stopped.

What arrives is checked against a digest before it takes its place: one that was asked for, or what
came from the address the first time.
"""

from __future__ import annotations

import http.client
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urldefrag

from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.runtime.progress import progress
from mgd3.storage.digests import digest_of, sha256_of
from mgd3.storage.fetched import record_digest, recorded_digest
from mgd3.storage.files import read_json, waiting, write_json, writing

log = logging.getLogger(__name__)

_DIGESTS = {"sha256": "SHA-256", "md5": "MD5"}
_CHUNK = 1 << 20
_TRIES = 5  # in a row without a byte
_SECONDS = 30.0  # without an answer
_TRANSIENT = (408, 429, 500, 502, 503, 504)


def fetch_url(url: str, path: Path, patience: float = 1.0, insecure: bool = False) -> None:
    """Fetch `url` to `path`; `url#sha256=HEX` (or md5=HEX) is checked.

    Raises `UserError` if it cannot be had. Without a digest it must be the file that came first, if
    `trust` remembers one. Plain http needs a digest or `insecure`.

    Bytes gather in a `.part` file beside `path`; another process that wants the same file waits.
    `patience` is the first wait in seconds after a failure; it doubles.
    """
    address, fragment = urldefrag(url)
    expected = {k: v[0].lower() for k, v in parse_qs(fragment).items() if k in _DIGESTS}
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


def _check(address: str, expected: Mapping[str, str], path: Path) -> None:
    """`UserError` unless a file has the digest that was asked for, or that came the first time."""
    for kind, wanted in expected.items():
        found = digest_of(path, kind)
        if found != wanted:
            raise UserError(
                f"{address}: {path} has the {_DIGESTS[kind]} {found}, not {wanted}: delete it"
            )
    digest, first = sha256_of(path), recorded_digest(address)
    if not expected and first not in (None, digest):
        raise UserError(
            f"{address}: {path} has the SHA-256 {digest}, but what came first had {first}; find "
            f"out which one is right and give it as sha256=HEX"
        )


def trust(url: str, path: Path) -> None:
    """Remember what an address gave: a later file that differs is refused."""
    address, fragment = urldefrag(url)
    published = any(fragment.startswith(f"{kind}=") for kind in _DIGESTS)
    digest = sha256_of(path)
    if recorded_digest(address) == digest:
        return
    place = record_digest(address, digest)
    if not published:
        log.warning(
            "no checksum of %s is published: trusting what came, SHA-256 %s, recorded in %s",
            *(path.name, digest, place),
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
            progress(f"fetching {name}", (offset + left) / 1e6, "MB", done=offset / 1e6) as advance,
        ):
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

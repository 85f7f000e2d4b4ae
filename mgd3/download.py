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
from pathlib import Path
from urllib.parse import parse_qs, urldefrag

from mgd3.artifacts import CorruptFileError, read_json, write_json, writing
from mgd3.progress import progress
from mgd3.types import UserError

log = logging.getLogger(__name__)

PARTS = ("transformer", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
_CHUNK = 1 << 20
_TRIES = 5  # in a row without a byte
_SECONDS = 30.0  # without an answer


def fetch_url(url: str, path: Path, patience: float = 1.0) -> None:
    """Fetch `url` to `path`; `url#sha256=HEX` is checked. Raises `UserError` if it cannot be had.

    Bytes gather in a `.part` file beside `path`. `patience` is the first wait in seconds after a
    failure; it doubles.
    """
    address, fragment = urldefrag(url)
    expected = parse_qs(fragment).get("sha256", [""])[0].lower()
    part = path.with_name(f".{path.name}.part")
    memory = path.with_name(f"{part.name}.json")  # which version of the file has arrived in part
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = part.stat().st_size if part.is_file() else 0
        try:
            _transfer(address, path.name, part, memory)
            break
        except urllib.error.HTTPError as error:
            raise UserError(f"{address}: the server answers {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            arrived = part.stat().st_size if part.is_file() else 0
            failures = 0 if arrived > before else failures + 1
            if failures == _TRIES:
                raise UserError(
                    f"{address} broke off {_TRIES} times at {arrived / 1e6:.1f} MB ({error}); "
                    "what has arrived is kept: the same command goes on from there"
                ) from error
            log.warning("%s: %s; going on at %.1f MB", address, error, arrived / 1e6)
            time.sleep(patience * 2**failures)
    if expected and sha256_of(part) != expected:
        part.unlink()
        memory.unlink(missing_ok=True)
        raise UserError(f"{address} does not have the SHA-256 {expected}; it was thrown away")
    with writing(path):
        part.replace(path)
    memory.unlink(missing_ok=True)


def _transfer(address: str, name: str, part: Path, memory: Path) -> None:
    """One connection; raises `OSError` or `HTTPException` unless the file is whole afterwards."""
    offset = part.stat().st_size if part.is_file() else 0
    version = _version(memory) if offset else ""
    request = urllib.request.Request(address)
    if version:
        request.add_header("Range", f"bytes={offset}-")
        request.add_header("If-Range", version)
    try:
        answer = urllib.request.urlopen(request, timeout=_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416 and version:  # nothing is left to send
            return
        raise
    with answer:
        resumes = answer.status == 206
        offset = offset if resumes else 0
        left = int(answer.headers.get("Content-Length") or 0)
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        write_json(memory, {"version": version})
        with (
            writing(part),
            part.open("ab" if resumes else "wb") as file,
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


def _version(memory: Path) -> str:
    try:
        return read_json(memory)["version"]
    except (FileNotFoundError, CorruptFileError, KeyError):
        return ""


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub publishes it."""

    name: str
    size: int
    sha256: str | None  # of large files only


def fetch_repository(repository: str, parts: Sequence[str] = PARTS) -> Path:
    """Fetch what a run reads of a hub repository into the hub's cache; returns its folder.

    Of a pipeline, the folders `parts`; of anything else, its own files. Safetensors where there
    are some, never half-precision copies.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        published = HfApi().model_info(repository, files_metadata=True).siblings or []
        files = [
            HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None) for s in published
        ]
        wanted = needed_files(files, parts)
        if not wanted:
            raise UserError(f"{repository} on the hub holds no weights that this project reads")
        for file in wanted:
            log.info("%s/%s, %.1f MB", repository, file.name, file.size / 1e6)
            path = Path(hf_hub_download(repository, file.name))
            if not _is_whole(path, file):
                path = Path(hf_hub_download(repository, file.name, force_download=True))
            if not _is_whole(path, file):
                path.resolve().unlink()
                raise UserError(
                    f"{repository}/{file.name} arrived with another size or SHA-256 than the hub "
                    "publishes, twice; it was thrown away: try again later"
                )
    except OfflineModeIsEnabled as error:
        raise UserError("HF_HUB_OFFLINE is set: unset it to fetch from the hub") from error
    except (HfHubHTTPError, OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(
            f"{repository} could not be fetched from the hub ({str(error).splitlines()[0]}); what "
            "has arrived is kept: the same command goes on from there"
        ) from error
    return path.parents[len(Path(file.name).parts) - 1]


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
    return file.sha256 is None or sha256_of(path) == file.sha256

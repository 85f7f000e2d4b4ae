"""Fetching weights from a repository of the Hugging Face hub.

What arrives is checked against the published sizes and digests before a run sees it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mgd3.runtime.errors import UserError
from mgd3.storage.digests import sha256_of

log = logging.getLogger(__name__)

PARTS = ("transformer", "unet", "vae", "text_encoder", "tokenizer", "scheduler")


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

"""Fetching weights from a repository of the Hugging Face hub.

What arrives is checked against the published sizes and digests before a run sees it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mgd3.runtime.errors import UserError
from mgd3.storage.repositories import HubFile, published_files, talking

log = logging.getLogger(__name__)

_KEPT = "; what has arrived is kept"

PARTS = (
    "transformer", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
    "scheduler",
)  # fmt: skip


def fetch_repository(repository: str, parts: Sequence[str] = PARTS) -> Path:
    """Fetch what a run reads of a hub repository into the hub's cache; returns its folder.

    Of a pipeline, the folders `parts`; of anything else, its own files. Safetensors where there
    are some, never half-precision copies.
    """
    return _snapshot(repository, wanted_files(repository, parts))


def wanted_files(repository: str, parts: Sequence[str] = PARTS) -> list[HubFile]:
    """What `fetch_repository` fetches, with sizes, as the hub says now."""
    from huggingface_hub import HfApi

    with talking(f"{repository} could not be fetched from the hub", _KEPT):
        published = published_files(HfApi().model_info(repository, files_metadata=True).siblings)
        wanted = needed_files(published, parts)
        if not wanted:
            raise UserError(f"{repository} on the hub holds no weights that this project reads")
        return wanted


def _snapshot(repository: str, wanted: Sequence[HubFile]) -> Path:
    """Download `wanted` and verify each file; returns their folder.

    An altered file is downloaded once more, then thrown away with `UserError`.
    """
    from huggingface_hub import snapshot_download

    for file in wanted:
        log.info("%s/%s, %.1f MB", repository, file.name, file.size / 1e6)
    with talking(f"{repository} could not be fetched from the hub", _KEPT):
        folder = Path(snapshot_download(repository, allow_patterns=[f.name for f in wanted]))
        altered = [f for f in wanted if not f.is_whole(folder / f.name)]
        if altered:
            names = [f.name for f in altered]
            snapshot_download(repository, allow_patterns=names, force_download=True)
            altered = [f for f in altered if not f.is_whole(folder / f.name)]
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


def cached_repository(repository: str, parts: Sequence[str]) -> Path | None:
    """The folder of a repository that was fetched before with all of `parts`; asks no server."""
    from huggingface_hub import try_to_load_from_cache

    names = ["model_index.json", "config.json", *(f"{part}/config.json" for part in parts)]
    for name in names:
        path = try_to_load_from_cache(repository, name)
        if isinstance(path, str):
            folder = Path(path.removesuffix(name))
            return folder if all(_holds(folder, part) for part in parts) else None
    return None


def _holds(folder: Path, part: str) -> bool:
    """Is a part of a pipeline whole, if it has one, or the model that is a repository's own?"""
    index = folder / "model_index.json"
    if index.is_file() and part not in json.loads(index.read_text()):
        return True
    alone = not index.is_file() and (folder / "config.json").is_file()
    inside = folder if alone else folder / part
    if alone or part not in _FILES_OF:
        return (inside / "config.json").is_file() and _has_weights(inside)
    return any((inside / name).is_file() for name in _FILES_OF[part])


_OF_TOKENIZERS = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
_FILES_OF = {
    "scheduler": ("scheduler_config.json",),
    "tokenizer": _OF_TOKENIZERS,
    "tokenizer_2": _OF_TOKENIZERS,
}


def _has_weights(folder: Path) -> bool:
    for index in folder.glob("*.index.json"):
        files = set(json.loads(index.read_text())["weight_map"].values())
        return all((folder / name).is_file() for name in files)
    return any(f.suffix in (".safetensors", ".bin") for f in folder.iterdir())


def sources_of(backbone: Mapping[str, Any], finetuned: bool = False) -> dict[str, list[str]]:
    """What a backbone's options name as weights, with the parts that are read of a pipeline.

    `finetuned`: with what fine-tuning it takes.
    """
    weights, vae = backbone.get("weights"), backbone.get("vae")
    rest = [part for part in PARTS if part != "vae"]
    found = {str(weights): rest if vae else list(PARTS)} if weights not in (None, "???") else {}
    vaes = [vae, backbone.get("finetuning_vae") if finetuned else None]
    return found | {str(name): ["vae"] for name in vaes if name}

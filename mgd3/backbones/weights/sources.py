"""Finding pre-trained weights: a hub id, a local diffusers folder, an https address or a file."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from mgd3.backbones.weights.download import cached_repository, fetch_repository
from mgd3.runtime.errors import UserError, first_line
from mgd3.storage.checkpoints import refuse_tensors
from mgd3.storage.documents import read_document
from mgd3.storage.fetched import download_path, is_url
from mgd3.storage.files import local_path
from mgd3.storage.formats import NoWeightsError, format_of
from mgd3.storage.repositories import hub_reachable

_PROJECT = Path(__file__).resolve().parents[3]
NO_HUB = "the hub cannot be reached, or HF_HUB_OFFLINE is set"
_WEIGHT_SUFFIXES = {".pt", ".pth", ".ckpt", ".safetensors"}
# What a model's configuration may name: of diffusers' classes those that backbones here are made of
_MODELS = (
    "AutoencoderKL", "AutoencoderTiny", "DiTTransformer2DModel", "Transformer2DModel",
    "UNet2DConditionModel", "VQModel",
)  # fmt: skip


def missing(key: str, value: str, reason: str) -> UserError:
    """What is missing, from where, the command that fetches it, and the key for a local copy."""
    origin = value if is_url(value) else f"the Hugging Face hub's {value}"
    word = _backbone_of(value) or (f"source={value}" if is_url(value) else value)
    return UserError(
        f"{key}={value}: these weights are not on this machine ({reason}). They come from "
        f"{origin}; with a network: python scripts/fetch_weights.py {word}. Without one, "
        f"copy them here from a machine that has them and set {key}=PATH"
    )


def _backbone_of(weights: str) -> str | None:
    """The backbone of configs/backbone whose weights these are: fetched so, its VAE comes, too."""
    line = re.compile(rf"^weights: {re.escape(weights)}(\s|$)", re.M)
    files = sorted((_PROJECT / "configs/backbone").glob("*.yaml"))
    return next((path.stem for path in files if line.search(path.read_text())), None)


def find_file(key: str, value: str) -> Path | None:
    """The weight file that `value` names: a path, below the project's if need be, or an address.

    None: it is no file (a hub id or a folder). Raises `UserError` for an address that has not been
    fetched.
    """
    if is_url(value):
        path = download_path(value)
        if not path.is_file():
            raise missing(key, value, f"{path} does not exist")
        return path
    local = local_path(value)
    return local if local is not None and local.is_file() else None


def is_hub_id(source: str) -> bool:
    """Could a repository of the hub be called so, and is it nothing on this machine?"""
    looks_like_a_file = source.startswith((".", "/", "~")) or is_url(source)
    named = source.count("/") == 1 and Path(source).suffix not in _WEIGHT_SUFFIXES
    return named and not looks_like_a_file and local_path(source) is None


def diffusers_source(key: str, value: object) -> str:
    """`value` if it names a local diffusers folder or looks like a hub id, else `UserError`."""
    source = os.path.expanduser(str(value))
    if Path(source).is_dir() or is_hub_id(source):
        return source
    raise UserError(
        f"{key}={value} does not exist; allowed: a hub id such as org/name, a local folder in "
        "diffusers' format (config.json beside *.safetensors), or one weight file "
        f"({', '.join(sorted(_WEIGHT_SUFFIXES))}) where the backbone has such a form; a small DiT "
        "of your own is trained by scripts/train_backbone.py with the same dataset keys"
    )


def at_hand(key: str, source: str, part: str) -> Path:
    """The folder of `source`, a folder itself or a hub id, with one part of it at least.

    What is not here is fetched from the hub; `UserError` where that cannot be.
    """
    if Path(source).is_dir():
        return Path(source)
    here = cached_repository(source, [part])
    if here is not None:
        return here
    if not hub_reachable():
        raise missing(key, source, NO_HUB)
    return fetch_repository(source, [part])


@torch.inference_mode(False)  # weights that gradients may flow through
def load_pretrained(
    key: str, source: str, subfolder: str, model: Any = None, alone: bool = True
) -> Any:
    """A model of diffusers (or `model`, of transformers), float32, complete, never unpickled code.

    A pipeline keeps it in `subfolder`; with `alone`, the folder or repository may also be the
    model's own.
    """
    folder = at_hand(key, source, subfolder)
    inside = "" if alone and (folder / "config.json").is_file() else subfolder
    options: dict[str, Any] = {"subfolder": inside} if inside else {}
    if _only_half_precision(folder / inside):
        options["variant"] = "fp16"
    if model is None:
        model = _diffusers_class(key, folder, inside)
        options["low_cpu_mem_usage"] = False  # needs another package, for a saving of seconds
    try:
        network, report = model.from_pretrained(
            folder,
            torch_dtype=torch.float32,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except MemoryError:
        raise
    except Exception as error:  # the loaders raise anything for files that they do not expect
        _refuse_other_files(key, folder / inside)
        raise UserError(
            f"{key}={source}: the weights in {subfolder}/ could not be loaded "
            f"({first_line(error)}); the folder may be incomplete: copy or fetch it again"
        ) from error
    refuse_tensors(f"{key}={source}", report["missing_keys"], report["unexpected_keys"], [])
    return network


def _refuse_other_files(key: str, folder: Path) -> None:
    """`UserError` for a file that is no weights, such as a clone's without Git LFS."""
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        try:
            format_of(path)
        except NoWeightsError as error:
            raise UserError(
                f"{key}: {path} is not a readable weight file ({error}); {error.remedy}"
            ) from error


def _diffusers_class(key: str, folder: Path, subfolder: str) -> Any:
    """The class that a model's configuration names."""
    import diffusers  # a second of import time, and `method=random` needs none of it

    diffusers.utils.logging.set_verbosity_error()  # it warns of its own older configurations
    name = load_config(key, folder, subfolder, "config.json").get("_class_name")
    if name not in _MODELS:
        raise UserError(
            f"{key}={folder}: {subfolder or '.'}/config.json names no model that this project "
            f"loads ({name!r}); allowed: {', '.join(_MODELS)}"
        )
    return getattr(diffusers, name)


def load_config(key: str, folder: Path, subfolder: str, name: str) -> dict[str, Any]:
    """A JSON file of a pipeline."""
    path = folder / subfolder / name
    try:
        return read_document(path, dict[str, Any], f"{key}={folder}: fetch or copy it again")
    except OSError as error:
        raise UserError(f"{key}={folder}: {subfolder}/{name} is missing") from error


def _only_half_precision(folder: Path) -> bool:
    names = [f.name for f in folder.glob("*.safetensors")]
    return bool(names) and all(".fp16" in name for name in names)

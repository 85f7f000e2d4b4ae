"""Finding pre-trained weights: a hub id, a local diffusers folder, or a single file."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mgd3.types import UserError

_WEIGHT_SUFFIXES = {".pt", ".pth", ".safetensors"}
_PROJECT = Path(__file__).resolve().parents[2]


def find_file(value: str) -> Path | None:
    """The weight file that `value` names, below the working directory or the project's."""
    path = Path(value).expanduser()
    return next((p for p in (path, _PROJECT / path) if p.is_file()), None)


def diffusers_source(key: str, value: object) -> str:
    """`value` if it names a local diffusers folder or looks like a hub id, else `UserError`."""
    source = os.path.expanduser(str(value))
    if Path(source).is_dir():
        return source
    looks_like_a_file = source.startswith((".", "/")) or Path(source).suffix in _WEIGHT_SUFFIXES
    if source.count("/") == 1 and not looks_like_a_file:
        return source
    raise UserError(
        f"{key}={value} does not exist; allowed: a hub id such as org/name, a local folder in "
        "diffusers' format (config.json beside *.safetensors), or for a DiT one .pt or "
        ".safetensors file"
    )


def load_pretrained(key: str, source: str, subfolder: str) -> nn.Module:
    """A diffusers model of whatever class its config names, float32; diffusers unpickles safely.

    A pipeline folder keeps it in `subfolder`; a model's own folder or repository is taken as is.
    """
    import diffusers  # a second of import time, and `method=random` needs none of it

    diffusers.utils.logging.set_verbosity_error()  # it warns of its own older configurations
    if Path(source).is_dir():
        inside = {} if (Path(source) / "config.json").is_file() else {"subfolder": subfolder}
        offline = True
    else:
        inside = {} if subfolder == "vae" else {"subfolder": subfolder}
        offline = not _hub_reachable()
    try:
        return diffusers.AutoModel.from_pretrained(
            source,
            torch_dtype=torch.float32,
            local_files_only=offline,
            low_cpu_mem_usage=False,  # needs another package, for a saving of seconds
            **inside,
        )
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        raise UserError(
            f"{key}={source}: the weights could not be loaded ({_first_line(error)}). "
            "With a network they are downloaded on first use; without one, copy the folder to "
            f"this machine and set {key}=FOLDER"
        ) from error


def read_weights(key: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a `.safetensors`, `.pt` or `.pth` file; never runs pickled code.

    A training checkpoint's «ema» entry is taken where there is one, as DiT's loader does.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return tensors.get("ema", tensors), {}
    except Exception as error:  # torch raises half a dozen types for a truncated file
        raise UserError(
            f"{key}={path} is not a readable weight file ({_first_line(error)}); it may be "
            "truncated or hold pickled code: download it again, or convert it to safetensors"
        ) from error


def metadata_json(metadata: dict[str, str], key: str) -> object:
    """One JSON entry of a safetensors file's metadata, None where absent."""
    return json.loads(metadata[key]) if key in metadata else None


def _hub_reachable() -> bool:
    """Spares a machine without a network the hub client's half minute of retries."""
    proxied = any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    from diffusers.utils.constants import HUGGINGFACE_CO_RESOLVE_ENDPOINT

    host = urlparse(HUGGINGFACE_CO_RESOLVE_ENDPOINT).hostname
    if os.environ.get("HF_HUB_OFFLINE") or proxied:
        return not os.environ.get("HF_HUB_OFFLINE")
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

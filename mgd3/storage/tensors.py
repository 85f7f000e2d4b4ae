"""Tensors on disk: safetensors with a checksum, the same bytes for the same content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from mgd3.runtime.errors import CorruptFileError, reading
from mgd3.storage.files import read_file, write_atomic


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Safetensors with a checksum of its tensors in the metadata, atomically."""
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    content = tensor_bytes(contiguous, {**metadata, "blake2s": tensors_digest(contiguous)})
    write_atomic(path, content)


def tensor_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file with its metadata in order; safetensors' own order differs every time."""
    data = save(tensors, metadata)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(text) <= size, "the same characters in another order"
    return data[:8] + text.ljust(size) + data[8 + size :]


def load_tensors(path: Path, made_from: dict[str, str] | None = None) -> dict[str, Tensor]:
    """Tensors written by `save_tensors`; `CorruptFileError` if a byte of them has changed.

    `made_from` holds metadata that the file must carry: it is of other input otherwise.
    """
    with reading(path, "it is no whole safetensors file", CorruptFileError):
        data = read_file(path)
        tensors = load(data)
        header_size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_size]).get("__metadata__", {})
    if metadata.get("blake2s") != tensors_digest(tensors):
        raise CorruptFileError(f"{path} does not match its checksum")
    for key, value in (made_from or {}).items():
        if metadata.get(key) != value:
            raise CorruptFileError(f"{path} was made from other {key}")
    return tensors


def tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Digest of names, shapes and bytes."""
    digest = hashlib.blake2s()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        if tensor.numel():  # its bytes, not copied: pixels may be a mapped file of gigabytes
            flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            content: Any = flat.numpy()  # as bytes, for numpy has no bfloat16
            digest.update(memoryview(content))
    return digest.hexdigest()

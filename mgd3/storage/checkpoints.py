"""Weight files: read without running their code, loaded whole or refused."""

from __future__ import annotations

import logging
import pickle
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from mgd3.runtime.errors import UserError, first_line
from mgd3.storage.documents import fitting
from mgd3.storage.formats import (
    SAFETENSORS,
    ZIP,
    NoWeightsError,
    format_of,
    zip_entries,
)
from mgd3.storage.state_dicts import network_tensors

log = logging.getLogger(__name__)

_NAMED = 3  # tensors named in a message
_OLDER_PICKLES = 4  # a number, the format's version, the machine, the content; then bytes


def read_weights(key: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors or pickled file; never runs pickled code.

    The file's first bytes decide, not its suffix. Of a training checkpoint the one network is
    taken (`network_tensors`); the log says which, and what was left off its names. Raises
    `UserError` saying what another file is and what to do.
    """
    try:
        metadata: dict[str, str] = {}
        format_ = format_of(path)
        if format_ == SAFETENSORS:
            content, metadata = _read_safetensors(path)
        else:
            content = _read_pickled(path, is_zip=format_ == ZIP)
        tensors, taken = network_tensors(content)
        _refuse_whole_numbers(tensors)
    except Exception as error:  # torch raises half a dozen types for a truncated file
        raise UserError(
            f"{key}={path} is not a readable weight file ({_reason(error)}); {_remedy(error)}"
        ) from error
    if taken:
        log.info("%s=%s: %s", key, path, taken)
    return tensors, metadata


def _reason(error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):  # torch's advice is to run the code
        return "it is no pickle of plain data"
    return first_line(error)


def _remedy(error: Exception) -> str:
    if isinstance(error, NoWeightsError):
        return error.remedy
    if isinstance(error, OSError) and error.strerror:
        return "see that it is there and may be read"
    return "it may be truncated or hold pickled code: fetch it again, or convert it to safetensors"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except Exception as error:  # safetensors' own, and torch's for a kind that it does not know
        raise NoWeightsError(
            first_line(error), "it is truncated or was altered: fetch it again"
        ) from error


def _refuse_whole_numbers(tensors: Mapping[str, Tensor]) -> None:
    """`NoWeightsError` for quantised weights, which would be taken for values as they stand."""
    for name, tensor in tensors.items():
        if tensor.dtype in (torch.int8, torch.uint8) or tensor.is_quantized:
            raise NoWeightsError(f"{name} is quantised ({tensor.dtype})", "give float weights")


def _read_pickled(path: Path, is_zip: bool) -> Any:
    """What `torch.save` wrote, in its zip or older format, objects of other kinds emptied.

    DiT's and CompVis's training checkpoints hold objects of their frameworks beside the tensors.
    """
    if is_zip:
        _refuse_programs(path)  # before torch opens the file to load it
    names = get_unsafe_globals_in_checkpoint(path) if is_zip else _older_names(path)
    placeholders: list[Any] = [(_Kind("_Emptied", (_Placeholder,), {}), name) for name in names]
    options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with safe_globals(placeholders):
        if path.name.endswith(".safetensors"):  # torch goes by the name, where it sees one
            with path.open("rb") as file:
                return torch.load(file, mmap=False, **options)
        return torch.load(path, mmap=is_zip and _can_be_mapped(path), **options)


def _refuse_programs(path: Path) -> None:
    """`NoWeightsError` for an archive with code records, as torch's own reader lists them.

    Python's zip reader may see other records than torch does, in a file with bytes appended.
    """
    for record in torch._C.PyTorchFileReader(str(path)).get_all_records():
        if record.lower() == "constants.pkl" or record.lower().startswith("code/"):
            raise NoWeightsError(
                "it is a TorchScript program", "give the weights that it was made from"
            )


def _can_be_mapped(path: Path) -> bool:
    """Are all of a zip's entries uncompressed?"""
    entries = zip_entries(path)
    return bool(entries) and all(e.compress_type == zipfile.ZIP_STORED for e in entries)


def _older_names(path: Path) -> list[str]:
    """Every name in the pickles of torch's older format, as torch spells it."""
    names = set()
    with path.open("rb") as file:
        for _ in range(_OLDER_PICKLES):
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    module, name = str(argument).split(" ", 1)
                    new_module = IMPORT_MAPPING.get(module, module)
                    names.add(".".join(NAME_MAPPING.get((module, name), (new_module, name))))
    return list(names)


class _Kind(type):
    """The type of placeholders; torch fills a dictionary only if its type equals `dict`."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is dict

    __hash__ = type.__hash__


class _Placeholder(list, metaclass=_Kind):
    """Stands for any object of a checkpoint that is not tensors; whatever fills it is dropped."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def _drop(self, *_: Any) -> None:
        """Forgets what a pickle would put in."""

    __setstate__ = __setitem__ = append = extend = _drop


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load `tensors` if they are just the network's; else `UserError` with the first others."""
    own = network.state_dict()
    misshapen = [
        f"{k} is {tuple(tensors[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in tensors and tensors[k].shape != own[k].shape
    ]
    absent, extra = [k for k in own if k not in tensors], [k for k in tensors if k not in own]
    refuse_tensors(source, absent, extra, misshapen)
    network.load_state_dict({k: v.float() for k, v in tensors.items()})


def refuse_tensors(
    source: str, absent: Sequence[str], extra: Sequence[str], misshapen: Sequence[str]
) -> None:
    """Raise `UserError` naming the first tensors of each kind, if there are any."""
    kinds = {"missing": sorted(absent), "unknown": sorted(extra), "of another shape": misshapen}
    found = [
        f"{len(names)} {kind} ({'; '.join(names[:_NAMED])}{' …' if len(names) > _NAMED else ''})"
        for kind, names in kinds.items()
        if names
    ]
    if found:
        raise UserError(
            f"{source} is not a checkpoint of this network: tensors {', '.join(found)}; check "
            "that it belongs here and is complete"
        )


def metadata_json(metadata: Mapping[str, str], key: str, shape: Any, source: str) -> Any:
    """One JSON entry of a safetensors file's metadata, None where absent.

    Raises `UserError` for one that does not fit `shape`.
    """
    if key not in metadata:
        return None
    return fitting(metadata[key], shape, f"{source}: its metadata's {key}", "fetch the file again")

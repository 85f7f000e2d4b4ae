"""Weight files: read without running their code, loaded whole or refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mgd3.runtime.errors import UserError

_NAMED = 3  # tensors named in a message


def read_weights(key: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a `.safetensors` or a pickled file; never runs pickled code.

    Of a training checkpoint, DiT's «ema» or CompVis's «state_dict» entry is taken.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}  # noqa: SIM118
        zipped = zipfile.is_zipfile(path)
        if zipped and any(n.endswith("constants.pkl") for n in zipfile.ZipFile(path).namelist()):
            raise TypeError("it is a TorchScript program")  # torch would run it
        content = torch.load(
            path, map_location="cpu", weights_only=False, mmap=zipped, pickle_module=_Inert
        )
        if isinstance(content, _Placeholder) or not isinstance(content, Mapping):
            raise TypeError("it holds no dictionary of tensors")
        content = next((content[k] for k in ("ema", "state_dict") if k in content), content)
        tensors = {k: v for k, v in content.items() if isinstance(v, Tensor)}
        if len(tensors) != len(content):
            raise TypeError("it holds something else than tensors")
        return tensors, {}
    except Exception as error:  # torch raises half a dozen types for a truncated file
        raise UserError(
            f"{key}={path} is not a readable weight file ({first_line(error)}); it may be "
            "truncated or hold pickled code: fetch it again, or convert it to safetensors"
        ) from error


class _Placeholder(dict):
    """Stands for any object of a checkpoint that is not tensors; whatever fills it is dropped."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def _drop(self, *_: Any) -> None:
        """Forgets what a pickle would put in."""

    __setstate__ = __setitem__ = append = extend = add = _drop


class _Builder:
    """A function that a pickle may call, but not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        """Forgets what a pickle would set."""


class _Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers; every other name becomes an empty placeholder."""

    _BUILDERS = (
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.nn.parameter", "Parameter"),
    )

    def find_class(self, module: str, name: str) -> Any:
        """torch's builders of tensors by exact name, storages by kind."""
        if module == "torch" and name.isalpha() and name.endswith("Storage"):
            return super().find_class(module, name)
        if (module, name) in self._BUILDERS:
            return _Builder(super().find_class(module, name))
        return _Placeholder


class _Inert:
    """A `pickle_module` for `torch.load`.

    DiT's and CompVis's training checkpoints hold objects of their frameworks (arguments,
    callbacks) beside the tensors, so `weights_only=True` refuses them whole.
    """

    Unpickler = _Unpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        """One pickled object."""
        return _Unpickler(file, **options).load()


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
            "that it belongs to this backbone and is complete"
        )


def metadata_json(metadata: Mapping[str, str], key: str) -> Any:
    """One JSON entry of a safetensors file's metadata, None where absent."""
    return json.loads(metadata[key]) if key in metadata else None


def first_line(error: BaseException) -> str:
    """An error's message in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

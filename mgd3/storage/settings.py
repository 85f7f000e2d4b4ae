"""What an object was made with, as plain data: two objects of the same settings do the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgd3.runtime.errors import UserError
from mgd3.storage.tensors import tensors_digest


def settings_of(part: object, leaving: Set[str] = frozenset()) -> dict[str, Any]:
    """A part's class and its public attributes as plain data, all the way down.

    What begins with an underscore is a part's own business, a cached property follows from the
    rest; `leaving` names further attributes, wherever they are. Raises `UserError` for one that
    cannot be told from another of its kind.
    """
    values = {
        name: _plain(value, f"{type(part).__qualname__}.{name}", leaving)
        for name, value in sorted(vars(part).items())
        if not name.startswith("_") and name not in leaving and not is_cached(part, name)
    }
    return {"class": type(part).__qualname__, **values}


def _plain(value: Any, name: str, leaving: Set[str]) -> Any:
    """A value as JSON has it; tensors and networks by a digest of what they hold."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path | torch.device | torch.dtype):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor | np.ndarray):
        return tensors_digest({"": torch.as_tensor(value)})
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {tensors_digest(value.state_dict())}"
    if isinstance(value, Mapping):
        return {str(key): _plain(v, f"{name}.{key}", leaving) for key, v in value.items()}
    if isinstance(value, Set):
        return sorted(map(str, value))
    if isinstance(value, Sequence):
        return [_plain(v, f"{name}.{k}", leaving) for k, v in enumerate(value)]
    if isinstance(value, partial):
        return _plain([value.func, value.args, value.keywords], name, leaving)
    if inspect.isfunction(value) and value.__name__ != "<lambda>" and not value.__closure__:
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "__dict__") and not callable(getattr(value, "__get__", None)):
        return settings_of(value, leaving)
    raise UserError(
        f"{name} is {value!r}, which cannot be told from another {type(value).__name__}: name the "
        "attribute with a leading underscore and keep beside it what it was made from"
    )


def is_cached(part: object, name: str) -> bool:
    """Is the attribute what a cached property has found?"""
    return isinstance(inspect.getattr_static(type(part), name, None), cached_property)

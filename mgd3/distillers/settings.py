"""What an object was made with, as plain data: two objects of the same settings do the same."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mgd3.modes.discovery import is_cached
from mgd3.runtime.errors import UserError
from mgd3.storage.tensors import tensors_digest

_OWN = ("mgd3.", "eval.")  # packages whose classes are known by their names alone
_DEEPEST = 20  # attributes within attributes: what goes deeper leads back to itself


def settings_of(part: object, leaving: Set[str] = frozenset()) -> dict[str, Any]:
    """A part's class and its public attributes as plain data, all the way down.

    What begins with an underscore is a part's own business, a cached property follows from the
    rest, and what has `only_how`, as `Compute`, says where and how, not what; `leaving` names
    further attributes of the part itself. Raises `UserError` for one that cannot be told from
    another of its kind.
    """
    name = type(part).__qualname__
    if inspect.isroutine(part) or isinstance(part, partial):
        return {"class": plain_settings(part, name)}
    return _attributes(part, name, leaving, 0)


def plain_settings(value: Any, name: str, depth: int = 0) -> Any:
    """A value as JSON has it; arrays, tensors and networks by a digest of what they hold.

    Raises `UserError`, which calls it `name`, as `settings_of`.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # NaN is not equal to itself
    if value is None or isinstance(value, str | int | float):
        return value
    if depth > _DEEPEST:
        raise _alike(value, name)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path | torch.device | torch.dtype):
        return str(value)
    if isinstance(value, Tensor | np.ndarray | np.generic | nn.Module):
        return _digest(value, name)
    if isinstance(value, Mapping):
        return {str(k): plain_settings(v, f"{name}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, Set):
        return sorted(json.dumps(plain_settings(v, name, depth + 1)) for v in value)
    if isinstance(value, Sequence):
        return [plain_settings(v, f"{name}.{k}", depth + 1) for k, v in enumerate(value)]
    if isinstance(value, partial):
        return plain_settings([value.func, value.args, value.keywords], name, depth + 1)
    if isinstance(value, type) or inspect.isfunction(value):
        if "<" not in value.__qualname__ and not getattr(value, "__closure__", None):
            return f"{value.__module__}.{value.__qualname__}"
    elif not inspect.isroutine(value):
        return _attributes(value, name, frozenset(), depth + 1)
    raise _alike(value, name)


def _attributes(part: object, called: str, leaving: Set[str], depth: int) -> dict[str, Any]:
    if not hasattr(part, "__dict__"):
        raise _alike(part, called)
    kind, module = type(part), f"{type(part).__module__}."
    module = "" if module.startswith(_OWN) else module
    values = {
        name: plain_settings(value, f"{called}.{name}", depth)
        for name, value in sorted(vars(part).items())
        if not name.startswith("_") and name not in leaving and not is_cached(part, name)
        if not getattr(value, "only_how", False)
    }
    return {"class": f"{module}{kind.__qualname__}"} | values


def _digest(value: Any, name: str) -> Any:
    if isinstance(value, np.generic):
        return plain_settings(value.item(), name)
    if isinstance(value, nn.Module):
        return f"{type(value).__qualname__} {tensors_digest(value.state_dict())}"
    try:
        content = value if isinstance(value, Tensor) else torch.as_tensor(value.copy())
    except TypeError:  # of text or objects
        raise _alike(value, name) from None
    return tensors_digest({"": content})


def _alike(value: object, name: str) -> UserError:
    return UserError(
        f"{name} is {value!r}, which cannot be told from another {type(value).__name__}: name the "
        "attribute with a leading underscore and keep beside it what it was made from"
    )

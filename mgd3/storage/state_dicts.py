"""The one network in what a checkpoint holds, under the names that it was built with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

from torch import Tensor

from mgd3.storage.formats import NoWeightsError

# Averaged weights first, which samples are drawn with; what stands in one line has no order
_ORDER = (
    ("ema",),
    ("model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema"),
    ("state_dict",),
    ("model", "model_state_dict", "module", "network", "net", "generator", "params"),
)
# What wrappers put before every name: DataParallel, torch.compile, Lightning
_PREFIXES = ("module.", "_orig_mod.", "model.")
_NAMED = 8  # entries in a message
_SAVE = "save the network's state_dict(), with torch.save or as safetensors"


def network_tensors(content: Any) -> tuple[dict[str, Tensor], str]:
    """The network's tensors in what a file holds, and in words what was taken and left off.

    A checkpoint's «ema» comes before its other networks; prefixes that all names share go.
    The words are empty for plain tensors that keep their names. Raises `NoWeightsError` if no
    entry is a network, or several are and none comes first.
    """
    if not isinstance(content, Mapping):
        raise NoWeightsError("it holds no dictionary of tensors", _SAVE)
    taken, tensors = ("", content) if _is_network(content) else _chosen(content)
    named, prefix = _without_prefixes(tensors)
    words = [f"«{taken}» is taken of {_listed(content)}"] if taken else []
    words += [f"«{prefix}» is left off all names"] if prefix else []
    return named, "; ".join(words)


def _is_network(value: Any) -> bool:
    """Is it tensors by name, and one at least?"""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _chosen(content: Mapping[Any, Any]) -> tuple[str, Mapping[str, Tensor]]:
    """The entry that is the network, and its name."""
    networks = {k: v for k, v in content.items() if _is_network(v)}
    for names in (*_ORDER, tuple(networks)):
        found = [name for name in names if name in networks]
        if len(found) > 1:
            raise NoWeightsError(
                f"it holds several networks: {_listed(found)}",
                f"save the one that is meant: torch.save(checkpoint[{found[0]!r}], PATH)",
            )
        if found:
            return found[0], networks[found[0]]
        _refuse_unreadable(content, names)  # others in its place would be another network
    raise NoWeightsError(f"it holds no tensors alone: {_listed(content) or 'nothing'}", _SAVE)


def _listed(names: Iterable[Any]) -> str:
    first = [str(name) for name in islice(names, _NAMED + 1)]
    return ", ".join(first if len(first) <= _NAMED else [*first[:_NAMED], "…"])


def _refuse_unreadable(content: Mapping[Any, Any], names: tuple[str, ...]) -> None:
    """`NoWeightsError` if one of the names has a value that may hold weights, but is no network."""
    for name in names:
        value = content.get(name)
        is_empty = isinstance(value, Mapping) and not value
        if not (value is None or is_empty or isinstance(value, bool | int | float | str)):
            raise NoWeightsError(f"its «{name}» holds something else than tensors", _SAVE)


def _without_prefixes(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The same tensors without what wrappers put before all names, and what that was."""
    names, removed = list(tensors), ""
    while prefix := next((p for p in _PREFIXES if all(_goes_on(n, p) for n in names)), ""):
        names = [name.removeprefix(prefix) for name in names]
        removed += prefix
    return dict(zip(names, tensors.values(), strict=True)), removed


def _goes_on(name: str, prefix: str) -> bool:
    return name.startswith(prefix) and name != prefix

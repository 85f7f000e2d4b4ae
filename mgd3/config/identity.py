"""What a run is: the values that make its content, and nothing else. Needs no torch.

A part of an identity is a group's choice, the version that its author raises when the meaning
changes, and the values that differ from the choice's own YAML. So renaming a module or adding an
option leaves every finished run where it is. Only what the method says it `reads` counts, followed
through the groups that it names. Paths never count: what files hold is compared by content
(claims.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from mgd3.config.schema import choices as choices_of
from mgd3.config.schema import find_plugins, hydra_ready, plain, prepared
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.hardware import usable_cores
from mgd3.runtime.text import is_printable
from mgd3.storage.fetched import download_path, is_url
from mgd3.storage.files import local_path
from mgd3.storage.unsaid import UNSAID

TRAIN = "train"  # what a method reads beside groups and keys: the real training images
_KEYS = ("ipc", "seed", "pool", "flip")
# What of compute= moves a result, if by rounding.
_COMPUTE = ("precision", "training_precision", "encoding_precision")
_GROUPS = (
    "dataset", "backbone", "method", "modes", "guidance", "start", "finetune", "features",
    "surrogate", "select", "refine", "prompts", "sampler", "protocol", "metrics",
)  # fmt: skip
_PLACES = (
    "root",
    "weights",
    "vae",
    "finetuning_vae",
    "teacher_weights",
    "captions",
)  # what only a user may point at
_ONLY_DATA = (
    "what is read from a file is data, never code and no place; name it yourself on the command "
    "line, where there is such a key with with=[KEY=VALUE]"
)
_USUAL_STEPS = 50  # of both papers and of every backbone's `sampling`
_SKIPPED = ("reads", "version", "role", "name", "family")
# What a group holds for others, whose own values show it where they take it.
_FOR_OTHERS = {
    "dataset": (
        "root",
        "student_size",
        "students",
        "mirror",
        "training",
        "skip_broken",
        "archive",
        "download",
    ),
    "backbone": ("sampling",),
    "protocol": ("students",),
}


def register() -> None:
    """Make our resolvers and sweepers known; call before Hydra composes anything."""
    find_plugins()
    OmegaConf.register_new_resolver("prepared", prepared, replace=True)
    OmegaConf.register_new_resolver("name", checks.name, replace=True)
    OmegaConf.register_new_resolver("version", _version, replace=True)
    OmegaConf.register_new_resolver("of_steps", _of_steps, replace=True)
    OmegaConf.register_new_resolver("usable_cores", usable_cores, replace=True)
    OmegaConf.register_new_resolver("at_most", _at_most, replace=True)
    OmegaConf.register_new_resolver(
        "set_folder", lambda *, _root_: folders(_root_, choices_of(_root_))[0], replace=True
    )
    OmegaConf.register_new_resolver(
        "run_id", lambda *, _root_: folders(_root_, choices_of(_root_))[1], replace=True
    )


def _version(own: int, image_size: int) -> int:
    """A YAML's version where students of `image_size` have a part in it: `${version:OWN,SIZE}`.

    Those of 65 to 128 px are one later: ResNets have had another max pool there since.
    """
    return own + (_is_number(image_size) and 64 < image_size <= 128)


def _at_most(most: int, value: int) -> int:
    """The smaller of both."""
    return min(most, value) if _is_number(value) else value


def _of_steps(step: int, steps: int) -> int:
    """A step that is given for the usual 50 sampling steps, in proportion to `steps`."""
    return step * steps // _USUAL_STEPS if isinstance(steps, int) and _is_number(step) else step


def _is_number(value: object) -> bool:
    """Anything else is refused by the part that reads it, which knows what is allowed."""
    return isinstance(value, (int, float))


def reads(cfg: DictConfig) -> list[str]:
    """Groups and keys that a method's images depend on, in the order of the method's list."""
    return _closure(cfg, cfg.method, "method")


def _closure(cfg: DictConfig, node: DictConfig, name: str) -> list[str]:
    if node.get("reads") is None and name == "method":
        raise UserError(
            f"method.reads is missing: {node.get('name')} must list the groups and keys that its "
            "images depend on, such as [backbone, modes, ipc, seed] (docs/extending.md)"
        )
    found: list[str] = []
    queue = list(node.get("reads") or [])
    while queue:
        key = queue.pop(0)
        if key in found:
            continue
        found.append(key)
        if isinstance(group := cfg.get(key), DictConfig):
            queue += group.get("reads") or []
        elif key not in (*_KEYS, *_COMPUTE, TRAIN) and key not in cfg:
            raise UserError(f"{name}.reads names {key!r}, which is no group and no key")
    return found


def set_identity(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """What makes a distilled set, by group or key."""
    found: dict[str, Any] = {key: _part(cfg, key, choices) for key in ("dataset", "method")}
    for key in reads(cfg):
        if key != TRAIN and choices.get(key) != UNSAID.get(key, ...):
            found[key] = _part(cfg, key, choices)
    return {key: part for key, part in found.items() if part != UNSAID.get(key, ...)}


def score_identity(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """What makes a student's score, given the images and the student."""
    found = {"protocol": _part(cfg, "protocol", choices)}
    found["training_precision"] = cfg.compute.training_precision
    return found


def set_reads_train(cfg: DictConfig) -> bool:
    """Do the images depend on the real training images?"""
    return TRAIN in reads(cfg)


def protocol_reads_train(cfg: DictConfig) -> bool:
    """Do scores depend on the real training images, as a teacher's do?"""
    return TRAIN in _closure(cfg, cfg.protocol, "protocol")


def dataset_identity(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """The dataset's part alone."""
    return _part(cfg, "dataset", choices)


def digest(values: Mapping[str, Any]) -> str:
    """Eight hex digits of plain values by key."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2s(text.encode(), digest_size=4).hexdigest()


def folders(cfg: DictConfig, choices: Mapping[str, str]) -> tuple[str, str]:
    """Where a distilled set lies below `runs`, and the id of the run that scores it.

    The set's folder is names for people, then the digest of its identity.
    """
    for key in ("dataset", "method", "protocol"):
        if cfg.get(key) is None:
            raise UserError(f"{key}=null leaves out what no run can do without; name one")
        checks.name(f"{key}.name", str(cfg[key].name))
    if not cfg.runs:
        raise UserError("runs has no value: give the folder that run folders lie in")
    identity = set_identity(cfg, choices)
    parts = [cfg.dataset.name, cfg.method.name]
    if "ipc" in identity:
        parts.append(f"ipc{cfg.ipc}")
    seed = f"seed{cfg.seed}-" if "seed" in identity else ""
    of_set = "/".join(map(str, [*parts, f"{seed}{digest(identity)}"]))
    return of_set, digest(identity | score_identity(cfg, choices))


def cell_id(identity: Mapping[str, Any], data: Mapping[str, str | None]) -> str:
    """What all seeds of one table cell share: everything but the seed, and the real images."""
    return digest(without_seed(identity) | {"data": dict(data)})


def without_seed(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What sets that differ in their seed alone share: what follows the seed is left out, too."""
    seed = identity.get("seed")
    return {key: _without(seed, key, part) for key, part in identity.items() if key != "seed"}


def _without(seed: Any, group: str, part: Any) -> Any:
    """A group's part without the values that its YAML takes from the seed."""
    values = part.get("values") if isinstance(part, Mapping) else None
    if not isinstance(values, Mapping) or seed is None or seed not in values.values():
        return part
    with hydra_ready():
        known = GlobalHydra.instance().config_loader().get_group_options(group)
    own = _defaults(group, part["choice"]) if part.get("choice") in known else {}
    kept = {k: v for k, v in values.items() if not (v == seed and own.get(k) == "${seed}")}
    return {**part, "values": kept}


def _part(cfg: DictConfig, key: str, choices: Mapping[str, str]) -> Any:
    if key in _COMPUTE:
        return cfg.compute[key]
    if key not in choices:
        return plain(cfg[key])
    choice, node = choices[key], cfg.get(key)
    if node is None:
        return {"choice": choice}
    version = node.get("version", 1) if isinstance(node, DictConfig) else 1
    return {"choice": choice, "version": version, "values": _changed(key, choice, node)}


def _changed(group: str, choice: str, node: DictConfig) -> dict[str, Any]:
    """Values that are not the choice's own; those that its YAML takes from elsewhere always."""
    own = _defaults(group, str(choice))
    values = {}
    for key, value in _leaves(plain(node)):
        first, last = key.split(".")[0], key.split(".")[-1]
        if first in _FOR_OTHERS.get(group, ()) or last in _SKIPPED:
            continue
        default = own.get(key)
        taken = isinstance(default, str) and "${" in default
        if taken or key not in own or _portable(default) != _portable(value):
            values[key] = _portable(value)
    return values


def _portable(value: Any) -> Any:
    """A file or folder by its name and size, wherever it lies; 1.0 as 1; others as they are."""
    if isinstance(value, list):
        return [_portable(v) for v in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    path = _named(value)
    if path is None:
        return value
    if path.is_dir():
        return f"{path.resolve().name}/, {sum(f.stat().st_size for f in path.rglob('*'))} bytes"
    return f"{path.name}, {path.stat().st_size} bytes"


def _named(value: Any) -> Path | None:
    """The file or folder that a value names, if it looks like a path and something is there."""
    if not isinstance(value, str) or ("/" not in value and "." not in value):
        return None
    return local_path(value)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; a list is one value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}{key}.")
    else:
        yield prefix.removesuffix("."), value


@cache
def _defaults(group: str, choice: str) -> dict[str, Any]:
    """A choice's own values by dotted key, what it takes from elsewhere unresolved."""
    with hydra_ready():
        try:
            cfg = compose(f"{group}/{choice}")
        except HydraException:  # a method that chooses other groups is composed with them
            cfg = compose("config", [f"{group}={choice}"])
    node = OmegaConf.select(cfg, group, throw_on_missing=False)
    return dict(_leaves(OmegaConf.to_container(node, resolve=False))) if node is not None else {}


def choices_with(key: str) -> list[str]:
    """The choices of its group that have a dotted key, such as «mode» for `guidance.stop_t`."""
    group, _, rest = key.partition(".")
    if group not in _GROUPS:
        return []
    with hydra_ready():
        known = GlobalHydra.instance().config_loader().get_group_options(group)
    return [
        c for c in known if any(f"{own}.".startswith(f"{rest}.") for own in _defaults(group, c))
    ]


def set_files(cfg: DictConfig) -> dict[str, Path]:
    """Local files and folders of weights that make a set, by dotted key: their content counts."""
    return _files(cfg, reads(cfg))


def score_files(cfg: DictConfig) -> dict[str, Path]:
    """Local files among the values that make a score, such as a teacher's weights."""
    return _files(cfg, ["protocol"])


def _files(cfg: DictConfig, keys: Sequence[str]) -> dict[str, Path]:
    found = {}
    for key in keys:
        for name, value in _leaves(plain(cfg[key])) if cfg.get(key) is not None else ():
            path, is_place = _named(value), name.rpartition(".")[2] in _PLACES
            if isinstance(value, str) and is_place:
                path = local_path(value)  # though it may have neither slash nor dot
            if isinstance(value, str) and is_url(value):  # as fetched
                path = download_path(value)
            known = path is not None and (path.is_file() or is_place)  # a prompt may be «.»
            if path is not None and known and not name.endswith("_target_"):
                found[f"{key}.{name}"] = path
    return found


def values_for_people(cfg: DictConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    """All values of the groups that count, for the manifest: no paths, no names of classes."""
    found: dict[str, Any] = {}
    for key, part in identity.items():
        if not isinstance(part, Mapping):
            found[key] = part
            continue
        leaves = _leaves(plain(cfg[key])) if cfg.get(key) is not None else ()
        found[key] = {
            name: _portable(value)
            for name, value in leaves
            if name not in ("root", "reads", "version") and not name.endswith("_target_")
        }
    return found


def overrides_of(identity: Mapping[str, Any], given: Sequence[str] = ()) -> list[str]:
    """run.py's arguments that give this identity again (without paths, which it does not hold).

    An identity is read from a file, which may be anybody's: it is a choice among the
    configurations that are here, and plain values of theirs. `given` are a user's own arguments:
    what they name is left to them. Raises `UserError` for anything else that would be imported,
    looked up, resolved, read or fetched.
    """
    named = {argument.split("=")[0].lstrip("+") for argument in given}
    found = []
    for key, part in identity.items():
        if not isinstance(part, Mapping):
            name = f"compute.{key}" if key in _COMPUTE else key
            checks.choice("a key of an identity", key, (*_KEYS, *_COMPUTE))
            found.append(f"{name}={_plain_value(key, part)}")
            continue
        if "choice" not in part:
            raise UserError(
                "this set was made from Python (mgd3.api), not by run.py: no command makes it again"
            )
        checks.choice("a group of an identity", key, _GROUPS)
        with hydra_ready():
            known = GlobalHydra.instance().config_loader().get_group_options(key)
        found.append(f"{key}={checks.choice(f'{key} of an identity', part['choice'], known)}")
        values = part.get("values", {})
        if not isinstance(values, Mapping):
            raise UserError(f"an identity has {key}.values={values!r}: they must be by name")
        for name, value in values.items():
            if f"{key}.{name}" in named:
                continue
            parts = str(name).split(".")
            plain_name = re.fullmatch(r"[a-zA-Z]\w*(\.[a-zA-Z]\w*)*", str(name))
            if not plain_name or parts[0] in _FOR_OTHERS.get(key, ()) or parts[-1] in _PLACES:
                raise UserError(f"an identity may not set {key}.{name}: {_ONLY_DATA}")
            found.append(f"++{key}.{name}={_plain_value(f'{key}.{name}', value)}")
    return found


def _plain_value(key: str, value: Any) -> str:
    """A value from a file as Hydra's command line takes it; `UserError` if it is more than data."""
    for leaf in value if isinstance(value, list) else [value]:
        if not isinstance(leaf, str | int | float | bool | None):
            raise UserError(f"an identity may not set {key}={leaf!r}: {_ONLY_DATA}")
        if not isinstance(leaf, str):
            continue
        named = key.rpartition(".")[2] in ("student", "students")
        own = named and "." in leaf and not leaf.startswith("timm/")
        place = leaf.startswith(("/", "~")) or ".." in leaf.split("/")
        if own or place or "${" in leaf or not is_printable(leaf):
            raise UserError(f"an identity may not set {key}={leaf!r}: {_ONLY_DATA}")
    return spelt(value)


def spelt(value: Any) -> str:
    """A value as Hydra's command line takes it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(spelt, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{spelt(k)}:{spelt(v)}" for k, v in value.items()) + "}"
    if not isinstance(value, str):
        return str(value)
    if value == "" or set(value) & set(" ,:=[]{}()'\"\\"):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return value

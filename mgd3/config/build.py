"""From a composed configuration to the parts of a run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from mgd3.config.schema import plain
from mgd3.distillers.parts import Distiller
from mgd3.runtime import checks
from mgd3.runtime.compute import Compiled, Compute, Work, pick_device
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import UserError, first_line

_SMALL_PARTS = ("modes", "guidance", "start", "sampler", "finetune", "select", "refine", "prompts")
# Keys of a group's YAML that are not its constructor's: its own name, and what other groups read.
_NOT_OPTIONS = (
    "name", "role", "reads", "version", "family", "students", "sampling", "training", "mirror",
)  # fmt: skip


def build(cfg: DictConfig, key: str, **runtime: Any) -> Any:
    """Instantiate one group; `runtime` holds arguments that are objects, not options.

    Raises `UserError` for an option that the class does not have.
    """
    if key == "dataset":
        parameters = inspect.signature(_class(key, plain(cfg[key]))).parameters
        places = {"cache": Path(cfg.cache), "data": cfg.get("data")}
        runtime |= {name: place for name, place in places.items() if name in parameters}
    return _fulfilling(key, _made(key, plain(cfg[key]), runtime))


def _made(key: str, node: dict[str, Any], runtime: Mapping[str, Any]) -> Any:
    """What a node describes; the parts of a sum of any names are made first."""
    target, node = _class(key, node), {k: v for k, v in node.items() if k != "_target_"}
    parameters = inspect.signature(target).parameters
    for own in set(_NOT_OPTIONS) - set(parameters):
        node.pop(own, None)
    of_any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    allowed = [name for name in parameters if name not in runtime]
    for option, value in node.items():
        part = of_any_name and isinstance(value, Mapping) and "_target_" in value
        if not part:
            checks.choice(f"an option of {key}", option, allowed)
        if value == "???":
            raise UserError(f"{key}.{option} is not set; give it as {key}.{option}=VALUE")
        if part:
            node[option] = _made(f"{key}.{option}", value, runtime)
    wanted = {name: value for name, value in runtime.items() if name in parameters}
    return target(**node, **wanted)


# What a run asks of each part, so that a class of one's own that lacks some is named at once.
_CONTRACTS = {
    "dataset": ("name", "classes", "student_size", "skip_broken", "location", "note", "images"),
    "method": ("distill",),
    "modes": ("__call__",),
    "guidance": ("needs_modes", "check", "bind"),
    "start": ("needs_modes", "steps", "initial"),
    "sampler": ("steps", "__call__"),
    "finetune": ("__call__",),
    "select": ("fit", "__call__"),
    "refine": ("__call__",),
    "prompts": ("needs_modes", "check", "of_modes"),
    "backbone": ("codec", "device", "precision", "class_ids", "predict"),
    "protocol": ("name", "image_size", "labels", "recipe", "prepare", "objective"),
    "metrics": ("fit",),
    "tracker": ("start",),
}


def _fulfilling(key: str, part: Any) -> Any:
    """The part, if it has what its place asks for."""
    missing = [name for name in _CONTRACTS.get(key, ()) if not hasattr(part, name)]
    if missing:
        kind = type(part)
        raise UserError(
            f"{key}: {kind.__module__}.{kind.__qualname__} lacks {', '.join(missing)}; "
            "docs/extending.md shows a complete example"
        )
    return part


def build_distiller(cfg: DictConfig, ranks: Ranks | None = None) -> Distiller:
    """The method's distiller, with those parts that its constructor asks for by name.

    The small parts are built in any case, so that a wrong value in them is refused whatever the
    method; the backbone only where it is used.
    """
    work = Work(
        cache=Path(cfg.cache),
        batch_size=cfg.compute.batch_size,
        workers=cfg.compute.workers,
        flip=cfg.flip,
    )
    features = build_space(cfg, "features") if cfg.features else None
    given = {
        "precision": cfg.compute.training_precision,
        "features": features,
        "surrogate": build_space(cfg, "surrogate") if cfg.surrogate else None,
    }
    parts: dict[str, Any] = {key: build(cfg, key, **given) for key in _SMALL_PARTS}
    parts["guidance"].check(parts["sampler"].steps)
    target = _class("method", cfg.method)
    wanted = set(inspect.signature(target).parameters)
    if "backbone" in wanted:
        if "prompts" in wanted:  # another kind of backbone lacks other options, too
            parts["prompts"].check(_class("backbone", cfg.backbone))
        parts["backbone"] = _backbone(cfg)
    parts |= {
        "features": features,
        "work": work,
        "pool": cfg.pool,
        "ranks": ranks,
        "on_step": _callback(cfg.on_step),
    }
    return build(cfg, "method", **{key: part for key, part in parts.items() if key in wanted})


def build_compute(cfg: DictConfig) -> Compute:
    """How the backbone's networks run."""
    keys = "device", "precision", "encoding_precision", "channels_last", "vae_slicing"
    compiled = Compiled.of(cfg.compute.compile)
    return Compute(compile=compiled.denoiser, **{key: cfg.compute[key] for key in keys})


def build_execution(cfg: DictConfig) -> dict[str, Any]:
    """How students run, as the evaluation's keyword arguments."""
    own = {key: cfg.compute[key] for key in ("channels_last", "parallel")}
    return {"compile": Compiled.of(cfg.compute.compile).training, **own}


def _callback(name: str | None) -> Any:
    """A user's own function by its dotted name."""
    if name is None:
        return None
    try:
        return hydra.utils.get_method(name)
    except Exception as error:  # whatever a user's module raises
        raise UserError(
            f"on_step={name} cannot be imported ({first_line(error)}); give module.function, and "
            "the module's folder in PYTHONPATH"
        ) from error


def _class(key: str, node: Mapping[str, Any]) -> Any:
    """The class that a node names; `UserError` if it cannot be imported."""
    target = node.get("_target_")
    if target is None:
        raise UserError(f"{key}: its configuration names no class (_target_: module.Class)")
    try:
        return hydra.utils.get_class(target)
    except Exception as error:  # whatever a user's module raises
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{key}: {target} cannot be imported ({reason}); it must be a class, check its "
            "name, and that its folder is in PYTHONPATH"
        ) from error


def shares_work(distiller: Distiller) -> bool:
    """Do several processes distil together, or does the first one alone?"""
    return "ranks" in inspect.signature(type(distiller)).parameters


def build_protocol(cfg: DictConfig) -> Any:
    """The evaluation protocol, with a device and a cache where it trains something of its own."""
    return build(cfg, "protocol", **_place(cfg))


def build_space(cfg: DictConfig, key: str) -> Any:
    """The feature space of one group, with the backbone where its latents are that space."""
    wanted = inspect.signature(_class(key, cfg[key])).parameters
    own = {"backbone": _backbone(cfg)} if "backbone" in wanted else {}
    return build(cfg, key, **_place(cfg), **own)


def _backbone(cfg: DictConfig) -> Any:
    return build(cfg, "backbone", compute=build_compute(cfg), cache=Path(cfg.cache))


def _place(cfg: DictConfig) -> dict[str, Any]:
    """Where and with what a part trains something of its own."""
    return {
        "device": pick_device(cfg.compute.device),
        "cache": Path(cfg.cache),
        "workers": cfg.compute.workers,
        "training_precision": cfg.compute.training_precision,
        "compiled": Compiled.of(cfg.compute.compile).training,
    }

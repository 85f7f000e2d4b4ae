"""From a composed configuration to the parts of a run."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from mgd3.config.schema import plain
from mgd3.distillers.parts import Distiller
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute, Work, pick_device
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import UserError, first_line

_SMALL_PARTS = ("modes", "guidance", "start", "sampler", "finetune")
# Keys of a group's YAML that are not its constructor's: its own name, and what other groups read.
_NOT_OPTIONS = (
    "name", "role", "reads", "version", "family", "students", "sampling", "training", "mirror",
)  # fmt: skip


def build(cfg: DictConfig, key: str, **runtime: Any) -> Any:
    """Instantiate one group; `runtime` holds arguments that are objects, not options.

    Raises `UserError` for an option that the class does not have.
    """
    node = plain(cfg[key])
    target = _class(cfg, key)
    node.pop("_target_")
    parameters = inspect.signature(target).parameters
    if key == "dataset":
        places = {"cache": Path(cfg.cache), "data": cfg.get("data")}
        runtime |= {name: place for name, place in places.items() if name in parameters}
    for own in set(_NOT_OPTIONS) - set(parameters):
        node.pop(own, None)
    allowed = [p for p in parameters if p not in runtime]
    for option, value in node.items():
        checks.choice(f"an option of {key}", option, allowed)
        if value == "???":
            raise UserError(f"{key}.{option} is not set; give it as {key}.{option}=VALUE")
    return _fulfilling(key, target(**node, **runtime))


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
    parts: dict[str, Any] = {
        key: _build_with(cfg, key, precision=cfg.compute.training_precision) for key in _SMALL_PARTS
    }
    parts["guidance"].check(parts["sampler"].steps)
    target = _class(cfg, "method")
    wanted = set(inspect.signature(target).parameters)
    if "backbone" in wanted:
        parts["backbone"] = _backbone(cfg)
    features = build_space(cfg, "features") if cfg.features else None
    parts |= {"features": features, "select": _build_with(cfg, "select", features=features)}
    parts |= {"work": work, "pool": cfg.pool, "ranks": ranks, "on_step": _callback(cfg.on_step)}
    return build(cfg, "method", **{key: part for key, part in parts.items() if key in wanted})


def build_compute(cfg: DictConfig) -> Compute:
    """How the backbone's networks run."""
    keys = ("device", "precision", "compile", "channels_last", "vae_slicing")
    return Compute(**{key: cfg.compute[key] for key in keys})


def build_execution(cfg: DictConfig) -> dict[str, Any]:
    """How students run, as the evaluation's keyword arguments."""
    return {key: cfg.compute[key] for key in ("channels_last", "compile", "parallel")}


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


def _class(cfg: DictConfig, key: str) -> Any:
    """The class that a group names; `UserError` if it cannot be imported."""
    target = cfg[key].get("_target_")
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
    return _build_with(cfg, "protocol", **_place(cfg))


def build_space(cfg: DictConfig, key: str) -> Any:
    """The feature space of one group, with the backbone where its latents are that space."""
    wanted = inspect.signature(_class(cfg, key)).parameters
    own = {"backbone": _backbone(cfg)} if "backbone" in wanted else {}
    return _build_with(cfg, key, **_place(cfg), **own)


def _backbone(cfg: DictConfig) -> Any:
    return _build_with(cfg, "backbone", compute=build_compute(cfg), cache=Path(cfg.cache))


def _place(cfg: DictConfig) -> dict[str, Any]:
    """Where and with what a part trains something of its own."""
    return {
        "device": pick_device(cfg.compute.device),
        "cache": Path(cfg.cache),
        "workers": cfg.compute.workers,
        "training_precision": cfg.compute.training_precision,
    }


def _build_with(cfg: DictConfig, key: str, **runtime: Any) -> Any:
    """`build` with those runtime arguments that the constructor takes."""
    wanted = inspect.signature(_class(cfg, key)).parameters
    return build(cfg, key, **{k: v for k, v in runtime.items() if k in wanted})

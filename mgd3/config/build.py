"""From a composed configuration to the parts of a run."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from mgd3.config.schema import part_of_identity, plain
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import MANIFEST
from mgd3.distillers.parts import Distiller
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute, Work, pick_device
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import UserError
from mgd3.runtime.files import claim, read_json

_SMALL_PARTS = ("modes", "guidance", "start", "sampler", "finetune")
# Keys of a group's YAML that are not its constructor's: its own name, and what other groups read.
_NOT_OPTIONS = ("name", "sampling", "training", "mirror")


def build(cfg: DictConfig, key: str, **runtime: Any) -> Any:
    """Instantiate one group; `runtime` holds arguments that are objects, not options.

    Raises `UserError` for an option that the class does not have.
    """
    node = plain(cfg[key])
    target = hydra.utils.get_class(node.pop("_target_"))
    parameters = inspect.signature(target).parameters
    for own in set(_NOT_OPTIONS) - set(parameters):
        node.pop(own, None)
    allowed = [p for p in parameters if p not in runtime]
    for option, value in node.items():
        checks.choice(f"an option of {key}", option, allowed)
        if value == "???":
            raise UserError(f"{key}.{option} is not set; give it as {key}.{option}=VALUE")
    return target(**node, **runtime)


def build_distiller(cfg: DictConfig, ranks: Ranks | None = None) -> Distiller:
    """The method's distiller, with those parts that its constructor asks for by name.

    The small parts are built in any case, so that a wrong value in them is refused whatever the
    method; the backbone only where it is used.
    """
    work = Work(
        cache=Path(cfg.cache), batch_size=cfg.batch_size, workers=cfg.workers, flip=cfg.flip
    )
    parts: dict[str, Any] = {key: build(cfg, key) for key in _SMALL_PARTS} | {"work": work}
    parts["guidance"].check(parts["sampler"].steps)
    target = hydra.utils.get_class(cfg.method["_target_"])
    wanted = set(inspect.signature(target).parameters)
    compute = Compute(
        device=cfg.device,
        precision=cfg.precision,
        compile=cfg.compile,
        channels_last=cfg.channels_last,
        vae_slicing=cfg.vae_slicing,
    )
    if "backbone" in wanted:
        parts["backbone"] = _build_with(cfg, "backbone", compute=compute, cache=Path(cfg.cache))
    features = build_space(cfg, "features") if cfg.features else None
    parts |= {"features": features, "select": _build_with(cfg, "select", features=features)}
    parts |= {"pool": cfg.pool, "ranks": ranks}
    return build(cfg, "method", **{key: part for key, part in parts.items() if key in wanted})


def shares_work(distiller: Distiller) -> bool:
    """Do several processes distil together, or does the first one alone?"""
    return "ranks" in inspect.signature(type(distiller)).parameters


def build_protocol(cfg: DictConfig) -> Any:
    """The evaluation protocol, with a device and a cache where it trains something of its own."""
    return _build_with(cfg, "protocol", **_place(cfg))


def build_space(cfg: DictConfig, key: str) -> Any:
    """The feature space of one group."""
    return _build_with(cfg, key, **_place(cfg))


def _place(cfg: DictConfig) -> dict[str, Any]:
    """Where and with what a part trains something of its own."""
    return {"device": pick_device(cfg.device), "cache": Path(cfg.cache), "workers": cfg.workers}


def _build_with(cfg: DictConfig, key: str, **runtime: Any) -> Any:
    """`build` with those runtime arguments that the constructor takes."""
    wanted = inspect.signature(hydra.utils.get_class(cfg[key]["_target_"])).parameters
    return build(cfg, key, **{k: v for k, v in runtime.items() if k in wanted})


def claim_folder(
    folder: Path, cfg: DictConfig, file: str, keys: tuple[str, ...], **found: Any
) -> None:
    """Write what makes this folder's content into it, or refuse a folder made by other values.

    `found` holds what no key says, such as class names read from a file.
    """
    values = {key: part_of_identity(cfg, key) for key in keys} | found
    remedy = "choose another hydra.run.dir or leave it out, or delete that folder"
    claim(folder, file, values, remedy)


def dataset_of(folder: Path) -> RealDataset:
    """The real dataset that the runs below `folder` distilled; `UserError` if they are several."""
    manifests = [read_json(path) for path in sorted(folder.rglob(MANIFEST))]
    configs = {
        json.dumps(
            {k: v for k, v in m["config"]["dataset"].items() if k not in _NOT_OPTIONS[1:]},
            sort_keys=True,
        )
        for m in manifests
    }
    if len(configs) != 1:
        names = ", ".join(sorted({m["dataset"] for m in manifests})) or "none"
        raise UserError(
            f"{folder} holds runs of {len(configs)} dataset configurations ({names}); name a "
            "folder with one, such as runs/digits"
        )
    return build(OmegaConf.create({"dataset": json.loads(configs.pop())}), "dataset")

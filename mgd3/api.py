"""The method as a function, for programs that have no use for a command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mgd3.backbones.contract import Backbone
from mgd3.data.claims import claim
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset, forget_journal
from mgd3.data.inventory import content_of, take_inventory
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.distillers.parts import Sampler
from mgd3.distillers.settings import settings_of
from mgd3.modes.finders import KMeansModes, ModeFinder
from mgd3.runtime import checks
from mgd3.runtime.compute import Work
from mgd3.sampling.starts import NoiseStart, Start
from mgd3.sampling.terms import DenoiseState, Guidance
from mgd3.storage.digests import content_digests
from mgd3.storage.fetched import download_path, is_url
from mgd3.storage.files import local_path, waiting

# Of a backbone: where it computes, and its codecs, which its own attributes describe.
_HOW = frozenset({"device", "codec", "finetuning_codec"})
_PLACES = ("weights", "vae")  # attributes that name files, folders or addresses


def distil(
    dataset: RealDataset,
    backbone: Backbone,
    ipc: int,
    out: Path | str,
    *,
    sampler: Sampler,
    guidance: Guidance,
    modes: ModeFinder | None = None,
    start: Start | None = None,
    seed: int = 0,
    batch_size: int | str = "auto",
    cache: Path | str = "cache",
    workers: int = 2,
    on_step: Callable[[DenoiseState], None] | None = None,
) -> DistilledDataset:
    """`ipc` images per class of `dataset` in the folder `out`; a second call finds them there.

    `modes` None is the paper's k-means, `start` None pure noise. Latents are kept in `cache`;
    `on_step` sees every sampling step. Raises `UserError` for images that do not decode, weights
    that are missing, classes that the backbone does not know, or a folder that holds images made
    by other settings or from other photographs.
    """
    checks.integer("ipc", ipc, minimum=1)
    checks.integer("seed", seed, minimum=0)
    guidance.check(sampler.steps)
    out, modes, start = Path(out), modes or KMeansModes(), start or NoiseStart()
    work = Work(cache=Path(cache), batch_size=batch_size, workers=workers, flip="none")
    parts = dict(backbone=backbone, sampler=sampler, guidance=guidance, modes=modes, start=start)
    identity = {
        "dataset": _own_values(dataset),
        **{key: settings_of(p, _HOW if p is backbone else frozenset()) for key, p in parts.items()},
        "precision": backbone.precision,
        "ipc": ipc,
        "seed": seed,
    }
    encoding = getattr(backbone.codec, "encoding_precision", "float32")
    if encoding != "float32":  # which stands for itself
        identity["encoding_precision"] = encoding
    train = content_of(
        dataset, take_inventory(dataset, "train", ipc, work.cache, workers), work.cache
    )
    with waiting(out):
        names = {c.wnid: c.name for c in dataset.classes}
        path, remedy = out / "identity.json", "choose another folder"
        files = content_digests(_local(identity), work.cache)
        claim(path, identity, {"train": train}, work.cache, remedy, classes=names, files=files)
        distilled = DistilledDataset(out)
        if distilled.complete:
            distilled.verify(work.cache, workers)
            forget_journal(out)
            return distilled
        distiller = GenerativeDistiller(
            backbone, sampler, guidance, modes, work, start, on_step=on_step
        )
        provenance = {
            "method": "mgd3.api.distil",
            "identity": identity,
            "config": identity,
            "data": {"train": train.digest},
        }
        return distiller.distill(dataset, ipc, seed, out, provenance)


def _own_values(dataset: RealDataset) -> dict[str, Any]:
    """A dataset's class and plain values; its images and names of classes are claimed beside."""
    values = {
        key: value
        for key, value in sorted(vars(dataset).items())
        if not key.startswith("_") and isinstance(value, str | int | float | bool | None)
    }
    return {"class": type(dataset).__qualname__, **values}


def _local(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Path]:
    """Files and folders that parts name, by dotted key: their content counts."""
    found: dict[str, Path] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _local(value, f"{prefix}{name}.")
        elif name in _PLACES and isinstance(value, str):
            path = download_path(value) if is_url(value) else local_path(value)
            if path is not None and path.exists():
                found[f"{prefix}{name}"] = path
    return found

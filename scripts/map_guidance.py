"""Where guidance gains over unguided samples, and in what."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor

from eval.metrics.coverage import HiddenModes
from eval.metrics.measuring import FeatureExtractor, features_by_class
from eval.metrics.set_metrics import RealFeatures, measure
from eval.reports.drawings.landscape_picture import landscape_picture
from eval.results.landscape import Landscape, Point, landscape
from eval.results.rows import EvalResult, read_results
from eval.results.sweeps import keys_of, value_of
from mgd3.config.build import build, build_space
from mgd3.config.run_folder import begun, record
from mgd3.config.schema import CONFIGS, choices
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import take_inventory
from mgd3.modes.discovery import ModeFile
from mgd3.modes.latent_space import RealLatents
from mgd3.runtime.errors import UserError
from mgd3.runtime.machine import commit
from mgd3.runtime.progress import track
from mgd3.storage.files import write_atomic, write_json
from scripts.measure import sets_of

log = logging.getLogger(__name__)

Measures = Mapping[str, float]
_KEYS = 3
_SHOWN = {  # of a set's metrics, by name
    "pairwise": "pairwise distance",
    "coverage": "coverage",
    "modes_shown": "modes shown",
    "representativeness_mean": "distance to real",
    "frechet": "Fréchet",
}


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="map_guidance")
def main(cfg: DictConfig) -> None:
    """Measure every set below `images` and draw what guidance gains over three keys."""
    with begun(cfg) as logs:
        dataset, space = build(cfg, "dataset"), build_space(cfg, "metrics")
        folder, keys = Path(str(cfg.images)).expanduser(), keys_of(cfg.by)
        if len(keys) != _KEYS:
            raise UserError(f"by={keys}: a map has three keys: a panel's, across and up")
        sets = sets_of(dataset, folder)
        if len({distilled.ipc for distilled in sets}) > 1:
            raise UserError(f"images={folder} holds sets of several ipc; name one of them")
    record(logs, cfg)
    measured = _measuring(cfg, dataset, space)
    points = [
        _point(distilled, keys, measured(distilled))
        for distilled in track(sets, "measuring", len(sets), "sets")
    ]
    found = landscape(points, (keys[0], keys[1], keys[2]))
    _write(folder, str(choices(cfg)["metrics"]), found)


def _measuring(cfg: DictConfig, dataset: Any, space: Any) -> Callable[[DistilledDataset], Measures]:
    """What a set's images are like: hidden modes, or metrics in a feature space."""
    if isinstance(space, HiddenModes):
        coverage = space.of(dataset)

        def hidden(distilled: DistilledDataset) -> Measures:
            found = coverage(distilled)
            return {
                f"modes shown of {found.modes}": float(found.covered),
                "distance to the nearest real of its mode": found.distance,
            }

        return hidden
    inventory = take_inventory(dataset, "train", 1, Path(cfg.cache), cfg.compute.workers)
    extract: FeatureExtractor = space.fit(dataset, inventory)
    real = RealFeatures([extract.real(label) for label in range(len(dataset.classes))])
    modes: list[Tensor] = []  # of the first set that has some: all of one IPC share them

    def metrics(distilled: DistilledDataset) -> Measures:
        made = features_by_class(distilled, extract)
        found = measure(real, made)
        values = {title: getattr(found, name) for name, title in _SHOWN.items()}
        if isinstance(extract, RealLatents):
            modes.extend(() if modes else _modes(distilled))
            values |= arrivals(made, modes)
        return {title: float(value) for title, value in values.items() if value is not None}

    return metrics


def _modes(distilled: DistilledDataset) -> list[Tensor]:
    """Modes (K, C h w) of each class; none where the set was made without."""
    paths = [distilled.folder / "modes" / f"{c.wnid}.safetensors" for c in distilled.classes]
    if not all(path.is_file() for path in paths):
        return []
    return [ModeFile().read(path, {}).centers.flatten(1) for path in paths]


def arrivals(made: Sequence[Tensor], modes: Sequence[Tensor]) -> dict[str, float]:
    """How far the images (K, C h w) of each class are from the modes of their index."""
    if not modes:
        return {}
    far = [torch.cdist(ours, theirs) for ours, theirs in zip(made, modes, strict=True)]  # (K, K)
    nearest = torch.cat([d.argmin(dim=1) == torch.arange(len(d)) for d in far])
    return {
        "distance to its mode": torch.cat([d.diagonal() for d in far]).mean().item(),
        "at its mode": nearest.double().mean().item(),
    }


def _point(distilled: DistilledDataset, keys: Sequence[str], measures: Measures) -> Point:
    manifest = distilled.manifest
    first, second, third = (value_of(manifest, key) for key in keys)
    scale = value_of(manifest, "guidance.scale")
    if first is None:
        raise UserError(f"by={keys[0]}: {distilled.folder} has no such key")
    return Point(
        place=(first, 0 if second is None else second, 0 if third is None else third),
        plain=scale is None or float(scale) == 0,
        seed=manifest["seed"],
        measures={**_accuracies(read_results(distilled.folder)), **measures},
    )


def _accuracies(rows: Sequence[EvalResult]) -> Measures:
    """Mean top1_last of a set's students; by student and protocol, where there are several."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        scores[row.student, row.protocol].append(row.top1_last)
    if len(scores) == 1:
        return {"accuracy, %": fmean(*scores.values())}
    return {f"accuracy, {s}, {p}": fmean(values) for (s, p), values in scores.items()}


def _write(folder: Path, space: str, found: Landscape) -> None:
    out = folder / f"guidance_map-{space}"
    svg, png = landscape_picture(found)
    write_atomic(out.with_suffix(".svg"), svg.encode())
    write_atomic(out.with_suffix(".png"), png)
    table = found.layout(f"{found.sets} set{'s' if found.sets > 1 else ''} or more at each place")
    write_atomic(out.with_suffix(".md"), table.markdown().encode())
    gains = [
        {"place": list(place), "measure": name, **asdict(gain)}
        for (place, name), gain in found.gains.items()
    ]
    content = {"commit": commit(), "keys": list(found.keys), "gains": gains}
    write_json(out.with_suffix(".json"), content)
    Console().print(table.for_terminal())
    log.info("the map: %s.png", out)


if __name__ == "__main__":
    command(main)

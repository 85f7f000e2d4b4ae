"""What a table's report shows below its numbers: sets, measures, maps, images on their way."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from eval.metrics.measuring import Measured, measure_sets
from eval.metrics.set_metrics import metrics_layout
from eval.reports.drawings.step_pictures import Trail
from eval.reports.paper_report import Section
from eval.results.layout import Layout
from mgd3.config.build import build, build_space
from mgd3.config.grid import Experiment, Located
from mgd3.config.paper import Denoising
from mgd3.config.remaking import Remaker
from mgd3.config.schema import choices, plain
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import take_inventory
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.sampling.watching import StepWatch

log = logging.getLogger(__name__)


def sections_of(experiment: Experiment) -> list[Section]:
    """Sets to look at and, where the experiment measures them, what was measured."""
    groups: dict[tuple[str, str], list[Located]] = defaultdict(list)
    for place in experiment.located:
        if DistilledDataset(place.distilled).complete:
            groups[place.job.dataset, place.job.ipc].append(place)
    sections, shown = [], set()
    for (dataset, ipc), places in groups.items():
        if not (experiment.table.measure or dataset not in shown) or ipc == "full":
            continue
        shown.add(dataset)
        sets: dict[str, list[DistilledDataset]] = defaultdict(list)
        for place in places:
            sets[place.job.row].append(DistilledDataset(place.distilled))
        cfg = places[0].cfg
        try:
            real: RealDataset | None = build(cfg, "dataset")
        except UserError as error:
            log.warning("report without real images of %s: %s", dataset, error)
            real = None
        section = Section(
            title=f"{dataset}, ipc {ipc}",
            sets=sets,
            real=real,
            points=experiment.table.points,
            keep=Path(cfg.cache, "planes"),
        )
        if experiment.table.measure and real is not None:
            try:
                section = _measured(experiment, section, cfg)
            except UserError as error:
                log.warning("%s is not measured: %s", section.title, error)
        if experiment.table.denoising is not None:
            try:
                section = replace(
                    section, trails=_trails(experiment, experiment.table.denoising, places)
                )
            except UserError as error:
                log.warning("%s is not shown step by step: %s", section.title, error)
        sections.append(section)
    return sections


def _trails(experiment: Experiment, wanted: Denoising, places: Sequence[Located]) -> list[Trail]:
    """Some images of each row's first set on their way: same noise, same mode, other settings."""
    first = {place.job.row: place for place in reversed(places)}
    steps, names = sorted(wanted.steps, reverse=True), experiment.class_names(wanted.classes)
    rows: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    modes: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for row in (row for row in experiment.table.rows if row in first):
        distilled = DistilledDataset(first[row].distilled)
        remaker = Remaker(distilled, first[row].cfg)
        most = remaker.distiller.sampler.steps - 1
        checks.integer("paper_table.denoising.steps", steps[0], maximum=most)
        for name in names:
            entry, watch = _entry(distilled, name, wanted.image), StepWatch(steps)
            remaker.latents(entry, watch)
            rows[name][row] = remaker.decoded(torch.cat([watch.seen[step] for step in steps]))
            if (mode := remaker.mode(entry)) is not None:
                modes[name][row] = remaker.decoded(mode)[0]
    stops = next(iter(experiment.table.swept.values()), {})
    return [
        Trail(title=name, steps=steps, rows=rows[name], stops=stops, modes=modes[name])
        for name in names
    ]


def _entry(distilled: DistilledDataset, name: str, index: int) -> Mapping[str, Any]:
    """The manifest's line of a class's image number `index`."""
    checks.integer("paper_table.denoising.image", index, maximum=distilled.ipc - 1)
    wnids = {info.name: info.wnid for info in distilled.classes}
    wnid = wnids[checks.choice("paper_table.denoising.classes", name, list(wnids))]
    entries = distilled.manifest["images"]
    return next(e for e in entries if (e["wnid"], e["index"]) == (wnid, index))


def _measured(experiment: Experiment, section: Section, cfg: Any) -> Section:
    """The section with diversity, distances and maps in a feature space."""
    assert section.real is not None
    space = build_space(cfg, "metrics")
    inventory = take_inventory(section.real, "train", 1, Path(cfg.cache), cfg.compute.workers)
    names = experiment.class_names(experiment.table.maps)
    labels = {info.name: label for label, info in enumerate(section.real.classes)}
    maps = {n: labels[checks.choice("paper_table.maps", n, list(labels))] for n in names}
    space = space.fit(section.real, inventory)
    found = measure_sets(
        section.sets, space, section.title, maps=maps, keep=Path(cfg.cache, "planes")
    )
    name = plain(cfg.metrics).get("student", choices(cfg)["metrics"])
    tables = [metrics_layout(found.metrics, f"{name}, {section.title}", found.scores)]
    printed = {} if experiment.rehearsal else experiment.table.published_diversity
    tables.append(_by_class(found, section, printed))
    return replace(
        section,
        tables=tables,
        planes=found.planes,
        scores=found.scores,
        class_planes=found.classes,
    )


def _by_class(
    found: Measured, section: Section, printed: Mapping[str, Mapping[str, float]]
) -> Layout:
    """Diversity by class: in the t-SNE plane beside the paper's, and in the feature space."""
    classes = next(iter(section.sets.values()))[0].classes
    names = [*(info.name for info in classes), "all samples"]
    columns: dict[str, list[str]] = {"class": names}
    for row, scores in found.scores.items():
        in_plane = [*scores.diversity, scores.diversity_mean]
        paper = [printed.get(row, {}).get("Average" if n == names[-1] else n) for n in names]
        in_space = [[*m.diversity, m.diversity_mean] for m in found.metrics[row]]
        columns[f"{row}: t-SNE, first set"] = ["" if v is None else f"{v:.2f}" for v in in_plane]
        if any(v is not None for v in paper):
            columns[f"{row}: paper"] = ["" if v is None else f"{v:.2f}" for v in paper]
        columns[f"{row}: features, all sets"] = [
            "" if None in values else f"{fmean(values):.4g}"
            for values in zip(*in_space, strict=True)
        ]
    return Layout.of_columns(f"diversity by class, {section.title}", columns)

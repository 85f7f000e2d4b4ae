"""What an experiment would take: runs, time, memory, disk; starts nothing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from eval.reports.rates import Rates
from eval.results.layout import Layout
from eval.scoring import missing_rows
from mgd3.config import identity
from mgd3.config.build import build, build_protocol
from mgd3.config.fetching import needed_weights, out_of_reach
from mgd3.config.grid import FULL, Located
from mgd3.config.schema import choices, plain
from mgd3.data.class_lists import read_class_list
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.compute import pick_device
from mgd3.runtime.errors import UserError
from mgd3.runtime.machine import machine_name
from mgd3.runtime.stages import duration

_OF_A_CLASS = 1300  # real images, where they cannot be counted: ImageNet's
_UNTIMED = (
    "«>»: the making of images is not counted where no finished run on this machine says how long "
    "it takes (run one cell with only.KEY=VALUE to know): "
)


def plan(places: Sequence[Located], pending: Sequence[Located]) -> tuple[Layout, list[str]]:
    """A line per row of the table, and what its numbers are."""
    device = pick_device(places[0].cfg.compute.device)
    rates = Rates(Path(places[0].cfg.runs), device)
    rows = list(dict.fromkeys(place.job.row for place in places))
    waiting = {_run_of(place) for place in pending}
    lines: list[list[str]] = []
    total: dict[str, float] = defaultdict(float)
    notes, untimed = set[str](), set[str]()
    counted: set[Any] = set()  # sets and runs that several rows share are made once
    for row in rows:
        mine = [place for place in places if place.job.row == row]
        needed: dict[str, float] = defaultdict(float)
        unknown = False
        for place in mine:
            if _run_of(place) not in waiting or _run_of(place) in counted:
                continue
            counted.add(_run_of(place))
            new = place.distilled not in counted
            counted.add(place.distilled)
            unknown |= _add(needed, place, new, rates, notes, untimed)
        needed["to do"] = sum(_run_of(place) in waiting for place in mine)
        needed["unknown"] = unknown
        lines.append(_line(row, len(mine), needed))
        for key, value in needed.items():
            total[key] = max(total[key], value) if key == "peak" else total[key] + value
    lines.append(_line("all", len(places), total))
    notes |= _fetched(pending)
    headers = ["row", "done", "to do", "images", "students", "time", "disk, GB", "memory, GiB"]
    explained = [
        f"Time one after another on this machine ({machine_name(device)}); rows that share runs "
        "with a row above count them there. What is done once for all runs comes on top: "
        "encoding, fine-tuning, teachers, feature networks. Disk is of the images; weights, and "
        "latents (about 17 kB a real image at 256 px), come on top. Memory is the largest training "
        "batch's; sampling adapts itself with compute.batch_size=auto.",
        *sorted(notes),
        *([_UNTIMED + ", ".join(sorted(untimed)) + "."] if untimed else []),
    ]
    return Layout(title="plan", headers=headers, lines=lines), explained


def _line(name: str, runs: int, needed: Mapping[str, float]) -> list[str]:
    """What some runs need, as a line of the table."""
    found = defaultdict(float, needed)
    return [
        name,
        str(int(runs - found["to do"])),
        *(str(int(found[key])) for key in ("to do", "images", "students")),
        ("> " if found["unknown"] else "") + duration(found["seconds"]),
        f"{found['bytes'] / 1e9:.2f}",
        f"{found['peak'] / 2**30:.2f}",
    ]


def _run_of(place: Located) -> tuple[Path, frozenset[tuple[str, int]]]:
    """Rows that share a run share its students, too."""
    return place.folder, frozenset(place.wanted)


def real_images(cfg: DictConfig, notes: set[str]) -> list[int] | None:
    """How many of each class; a guess where they are not here, None where there is none."""
    if "download" in cfg.dataset:
        cfg.dataset.download = False  # a plan fetches nothing
    try:
        dataset = build(cfg, "dataset")
        return [len(dataset.images("train", label)) for label in range(len(dataset.classes))]
    except UserError as error:
        notes.add(f"Not ready: {error}.")
        known = cfg.dataset.get("class_list")
        return [_OF_A_CLASS] * len(read_class_list(known)) if known else None


def _fetched(pending: Sequence[Located]) -> set[str]:
    """What the sets that are still to be made take from the hub, or cannot have now."""
    notes, asked = set(), set()
    for place in pending:
        cfg = place.cfg
        asks = json.dumps([plain(cfg.backbone), choices(cfg).get("finetune")], sort_keys=True)
        done = DistilledDataset(place.distilled).complete
        if done or asks in asked or "backbone" not in identity.reads(cfg):
            continue
        asked.add(asks)
        notes |= {f"Not ready: {error}." for error in out_of_reach(cfg)}
        notes |= {f"To be fetched first: {need}." for need in needed_weights(cfg)}
    return notes


def _add(
    needed: dict[str, float],
    place: Located,
    new: bool,
    rates: Rates,
    notes: set[str],
    untimed: set[str],
) -> bool:
    """Add what one run needs, its images if they are `new`; is a part of it unknown?"""
    cfg = place.cfg
    backbone, unknown = plain(cfg.backbone), False
    name, ipc = cfg.dataset.name, cfg.ipc
    real = real_images(cfg, notes)
    if real is None:
        return True
    num_classes = len(real)
    images = num_classes * ipc
    if place.job.ipc == FULL:
        images, ipc = sum(real), max(real)
    if new and not DistilledDataset(place.distilled).complete:
        needed["images"] += images
        needed["bytes"] += images * rates.image_bytes(name, backbone)
        made_by = identity.set_identity(cfg, choices(cfg)).get("backbone")
        spent = rates.distilling(cfg.method.name, made_by)
        if spent is None:
            unknown = True
            weights = backbone.get("weights", "a closed form")
            untimed.add(f"{cfg.method.name} with {weights}" if made_by else str(cfg.method.name))
        else:
            needed["seconds"] += spent * images
    protocol = build_protocol(cfg)
    for student, _ in missing_rows(place.folder, list(place.wanted)):
        recipe = protocol.recipe(ipc, num_classes, student)
        batch = min(recipe.batch_size, images)
        spent, peak, recorded = rates.training(student, protocol, num_classes, batch)
        if not recorded:
            notes.add(
                "Training times of students without a finished run on this machine are those of "
                "one batch tried now, without augmentation, tests or a teacher."
            )
        needed["students"] += 1
        needed["seconds"] += spent * recipe.epochs * images
        needed["peak"] = max(needed["peak"], peak)
    return unknown

"""Summarise a folder of finished runs: the table here, summary.json and report.html there."""

from __future__ import annotations

import json
import logging
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig
from pydantic import BaseModel
from rich.console import Console

from eval.reports.drawings.curves import sweep_picture
from eval.reports.findings import sentences
from eval.reports.run_report import (
    distilled_sets,
    named,
    row_names,
    write_report,
    write_summary,
)
from eval.reports.samples import overview_picture
from eval.results.costs import cost_layout
from eval.results.layout import Layout
from eval.results.rows import EvalResult, read_results
from eval.results.sweeps import keys_of, rows_by
from eval.results.tables import markdown, terminal
from mgd3.config.build import build, build_space
from mgd3.config.identity import overrides_of, spelt
from mgd3.config.schema import CONFIGS, composed
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.storage.documents import read_document
from mgd3.storage.files import remove_leftovers, write_atomic

log = logging.getLogger(__name__)

SUMMARY = "summary.json"


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="report")
def main(cfg: DictConfig) -> None:
    """Read every run below the folder and write its summary, table and report."""
    folder = Path(cfg.folder)
    keys = keys_of(cfg.by)
    if cfg.plot and len(keys) != 1:
        raise UserError(f"plot needs by=KEY, one key for the horizontal axis; got {len(keys)}")
    remove_leftovers(folder, deep=False)
    rows = read_results(folder)
    if not rows:
        raise UserError(f"{folder} holds no finished run (no results.jsonl with rows below it)")
    _refuse_foreign_files(folder)
    sets = [d for d in distilled_sets(folder) if _can_be_shown(d)]
    dataset, name = _real_images(folder, sets, cfg.dataset.root)
    if keys:
        rows, values = rows_by(rows, [folder], keys)
        if cfg.plot:
            first = {variant: value for variant, (value,) in values.items() if value is not None}
            write_atomic(Path(cfg.plot), sweep_picture(rows, first, keys[0]))
    write_summary(folder / SUMMARY, rows)
    hidden = _hidden_modes(sets, rows, dataset) if hasattr(dataset, "parts") else []
    title = f"{name}: {folder.resolve().name}"
    write_report(
        folder / "report.html", rows, sets, dataset, title, hidden, Path(cfg.cache, "planes")
    )
    costs = cost_layout(*named(sets, rows)).markdown()
    said = ["\n".join([table.markdown(), *found, ""]) for table, found in hidden]
    write_atomic(folder / "table.md", "\n".join([markdown(rows), *said, costs]).encode())
    if cfg.picture:
        picture = overview_picture(sets, list(cfg.methods), cfg.real_images)
        write_atomic(Path(cfg.picture), picture)
    Console().print(terminal(rows))
    for table, found in hidden:
        Console(markup=False).print("", table.for_terminal(), *found, sep="\n", highlight=False)
    Console(markup=False).print(f"summary: {folder / SUMMARY}\nreport:  {folder / 'report.html'}")


def _hidden_modes(
    sets: Sequence[DistilledDataset],
    rows: Sequence[EvalResult],
    dataset: RealDataset | None,
) -> list[tuple[Layout, list[str]]]:
    """Which hidden modes the sets of each IPC show, and what that allows to say."""
    # torchvision and all that networks take: seconds that other datasets are spared
    from eval.metrics.coverage import HiddenModes, coverage_layout, measure_coverage

    assert dataset is not None
    cfg = composed(f"dataset={dataset.name}", "metrics=coverage", name="measure")
    coverage = cast("HiddenModes", build_space(cfg, "metrics")).of(dataset)
    found, names = [], row_names(sets, rows)
    for ipc in sorted({d.ipc for d in sets}):
        methods: dict[str, list[DistilledDataset]] = defaultdict(list)
        for distilled in sets:
            if distilled.ipc == ipc:
                methods[names[distilled.folder]].append(distilled)
        measured = measure_coverage(methods, coverage, f"ipc {ipc}")
        own = [row for row in rows if row.ipc == ipc]
        table = coverage_layout(measured, f"Hidden modes, {ipc} images per class")
        found.append((table, sentences(own, measured, "mgd3", ipc)))
    return found


def _refuse_foreign_files(folder: Path) -> None:
    """`UserError` if what is written here would take the place of a user's own files."""
    try:
        read_document(folder / SUMMARY, _Summary, "move it away, or name another folder")
    except FileNotFoundError:
        there = [name for name in ("report.html", "table.md") if (folder / name).exists()]
        if there:
            raise UserError(
                f"{folder} holds a {there[0]} that is not this script's (there is no {SUMMARY} "
                "beside it): move it away, or name the folder with the runs below it"
            ) from None


class _Summary(BaseModel):
    rows: list[dict[str, Any]]
    explanation: str


def _can_be_shown(distilled: DistilledDataset) -> bool:
    """False, with a line that says so, for a set of an earlier version or with images elsewhere."""
    try:
        _ = distilled.path(distilled.manifest["images"][0])
        return bool(distilled.identity)
    except UserError as error:
        log.warning("left out: %s", error)
        return False


def _real_images(
    folder: Path, sets: Sequence[DistilledDataset], root: str | None
) -> tuple[RealDataset | None, str]:
    """The dataset that the sets say they were made from, if its images are here; its name.

    What a manifest says is taken as a choice among our own configurations, never as a class.
    """
    if not sets:
        return None, folder.resolve().name
    datasets = [d.identity.get("dataset") for d in sets]
    parts = {json.dumps(part, sort_keys=True): part for part in datasets}
    names = sorted({d.manifest["dataset"] for d in sets})
    if len(parts) != 1 or len(names) != 1:
        raise UserError(
            f"{folder} holds runs of {len(parts)} dataset configurations ({', '.join(names)}); "
            "name a folder with one, such as runs/digits"
        )
    try:
        (part,) = parts.values()
        overrides = overrides_of({"dataset": part})
        if root is not None:
            overrides.append(f"dataset.root={spelt(root)}")
        return build(composed(*overrides), "dataset"), names[0]
    except UserError as error:
        log.warning("no map of real images: %s", error)
        return None, names[0]


if __name__ == "__main__":
    command(main)

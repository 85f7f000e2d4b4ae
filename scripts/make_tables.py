"""The paper's tables with our numbers in them, from finished runs: pages, LaTeX, CSV, a report."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig
from rich.console import Console
from rich.measure import Measurement

from eval.reports.comparison import PaperComparison
from eval.reports.paper_cell import MEAN, TableCell, averaged
from eval.reports.paper_report import write_paper_report
from eval.results.layout import Layout
from eval.results.rows import EvalResult, ResultStore, order_of
from eval.tracking import artifact_name, keep
from mgd3.config import identity
from mgd3.config.build import build
from mgd3.config.cell_command import cell_command
from mgd3.config.grid import Experiment, Located, paper_argument, read_request
from mgd3.config.paper import FAMILIES
from mgd3.config.schema import CONFIGS, choices
from mgd3.data.claims import read_claim
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.storage.files import remove_leftovers, write_atomic, write_json
from scripts.table_sections import sections_of

log = logging.getLogger(__name__)

CellKey: TypeAlias = tuple[str, str, str, str]  # row, dataset, IPC, student


def tables(cfg: DictConfig, arguments: list[str], launch: Any) -> None:
    """Print the cells that were asked for, write the files of all; launches nothing."""
    request = read_request(cfg, arguments)
    if cfg.explain is not None:
        raise UserError(
            f"explain is of scripts/reproduce.py: the same {paper_argument(request.name)}"
        )
    experiment = Experiment(request.name, request.overrides, request.only, cfg.rehearsal)
    show_tables(experiment, Console(markup=False))


def show_tables(experiment: Experiment, console: Console) -> None:
    """Print the experiment's cells, as its filters leave them, and write the files of all."""
    shown = compared(experiment)
    if shown.cells:
        for part in shown.matrices(lambda table: _width(console, table) <= console.width):
            console.print(part.for_terminal())
    for note in shown.remarks_and_notes():
        console.print(note)
    console.print(f"tables and report: {write_tables(experiment.whole())}", soft_wrap=True)


def _width(console: Console, table: Layout) -> int:
    """Characters of its widest line, if no cell is folded."""
    shown = table.for_terminal()
    shown.title = None
    wide = console.options.update(max_width=sys.maxsize)
    return Measurement.get(console, wide, shown).maximum


def write_tables(experiment: Experiment) -> Path:
    """Everything that the finished runs of an experiment say, in one folder; returns it."""
    if not experiment.located:
        raise UserError("; ".join(experiment.notes()))
    comparison, cfg = compared(experiment), experiment.located[0].cfg
    folder = Path(cfg.runs) / "tables" / experiment.variant
    remove_leftovers(folder)
    if comparison.cells:
        write_atomic(folder / "table.tex", comparison.latex().encode())
        write_atomic(folder / "table.csv", comparison.csv().encode())
        write_json(folder / "table.json", comparison.records())
    sections = sections_of(experiment)
    extra = [table for section in sections for table in section.tables]
    pages = [comparison.markdown(), *(table.markdown() for table in extra)]
    write_atomic(folder / "table.md", "\n".join(pages).encode())
    report = folder / "report.html"
    sets, rows = _everything(experiment)
    tracker = build(cfg, "tracker")
    real_images = bool(cfg.tracker.get("real_images"))
    pictures = write_paper_report(report, comparison, sections, sets, rows, real_images)
    config = {"experiment": experiment.name, "overrides": list(experiment.overrides)}
    named, records = f"tables-{experiment.variant}", Path(cfg.runs)
    with tracker.start(named, experiment.name, config, records) as run:
        if comparison.cells:
            cells = comparison.records()
            run.log_table(experiment.name, list(cells[0]), [list(r.values()) for r in cells])
        for table in extra:
            run.log_table(table.title, table.headers, table.texts())
        run.log_images("report", pictures)
        files = {path.name: path for path in sorted(folder.glob("table.*"))}  # no pictures
        names = [artifact_name(distilled.label) for _, distilled in sets]
        made_of = {"sets": names, "runs": order_of(row.run_id for _, row in rows)}
        keep(run, named, "table", files, config | made_of)
    return folder


def compared(experiment: Experiment) -> PaperComparison:
    """The paper's cells with the rows of finished runs."""
    table = experiment.table
    ours, asked = _finished(experiment)
    if table.mean_over_students:
        ours, asked = _means(ours, experiment.students), _asked_of_means(asked)
    published = {} if experiment.rehearsal else _flat(table.published)
    published = {key: value for key, value in published.items() if experiment.keeps(*key)}
    bands = {} if experiment.rehearsal else _flat(table.bands)
    keys = order_of([*asked, *published])
    apart = set(table.published) - set(table.rows)  # then the paper's order has to be kept
    rows = order_of([*(table.published if apart else ()), *table.rows])
    families, folders = experiment.families(), _folders(experiment)
    overrides = experiment.shown_overrides
    keys.sort(key=lambda k: rows.index(k[0]))
    cells = [
        TableCell(
            row=key[0],
            dataset=key[1],
            ipc=key[2],
            student=key[3],
            paper=tuple(published[key]) if key in published else None,
            band=tuple(bands[key]) if key in bands else None,
            family=table.family_of(key[0]) if key in published else None,
            our_family=families.get(key[0]),
            ours=tuple(ours.get(key, ())),
            asked=asked.get(key, 0),
            command=cell_command(experiment, *key[:3], overrides),
            folders=tuple(folders.get(key[:3], ())),
        )
        for key in keys
    ]
    return PaperComparison(
        title=_title(experiment),
        cells=cells,
        remarks=_remarks(experiment),
        errata={} if experiment.rehearsal else table.errata,
        claims=table.claims,
        swept=table.swept,
        families=FAMILIES,
        advice="" if ours or _manifests(experiment) else _advice(experiment),
    )


def _folders(experiment: Experiment) -> dict[tuple[str, str, str], list[str]]:
    """Of each cell its sets' folders, made or not, seen from the table's."""
    found: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for place in experiment.located:
        job, here = place.job, Path(place.cfg.runs) / "tables" / experiment.variant
        found[job.row, job.dataset, job.ipc].append(os.path.relpath(place.distilled, here))
    return found


def _advice(experiment: Experiment) -> str:
    words = ["python scripts/reproduce.py", paper_argument(experiment.file)]
    own = [*map(shlex.quote, experiment.shown_overrides)]
    if experiment.rehearsal:
        return (
            f"Nothing of it has been rehearsed yet: «{' '.join([*words, 'rehearsal=true', *own])}» "
            "does, on digits, in minutes."
        )
    return (
        "Nothing of it has been run yet, and all numbers are the paper's: "
        f"«{' '.join([*words, *own, 'plan=true'])}» says what it would take, without plan=true it "
        f"is run, and «{' '.join([*words, 'rehearsal=true'])}» runs the same grid on digits, in "
        "minutes."
    )


def _finished(
    experiment: Experiment,
) -> tuple[dict[CellKey, list[EvalResult]], dict[CellKey, int]]:
    """Rows that are there, and how many there should be, by cell."""
    ours: dict[CellKey, list[EvalResult]] = defaultdict(list)
    asked: dict[CellKey, int] = defaultdict(int)
    for place in experiment.located:
        job = place.job
        for row in ResultStore(place.folder / "results.jsonl").rows():
            student = place.wanted.get((row.student, row.student_seed))
            if student is not None:
                key = (job.row, job.dataset, job.ipc, student)
                ours[key].append(replace(row, student=student))
        for student in place.wanted.values():
            asked[job.row, job.dataset, job.ipc, student] += 1
    return ours, asked


def _remarks(experiment: Experiment) -> list[str]:
    remarks = experiment.notes()
    commits = sorted({m["commit"] for m in _manifests(experiment)})
    if commits:
        several = "Warning: sets of several commits" if len(commits) > 1 else "Sets made by commit"
        remarks.append(f"{several}: {', '.join(commits)}.")
    if left_out := set().union(*map(_other_protocols, experiment.located)):
        remarks.append(
            "Warning: these sets have scores under other protocols, which are not in this table: "
            + ", ".join(sorted(left_out))
        )
    return remarks


def _everything(
    experiment: Experiment,
) -> tuple[list[tuple[str, DistilledDataset]], list[tuple[str, EvalResult]]]:
    """All finished sets and all students, each once, by the names of their cells."""
    sets: dict[Path, tuple[str, DistilledDataset]] = {}
    rows: dict[Path, list[tuple[str, EvalResult]]] = {}
    for place in experiment.located:
        name = f"{place.job.row}, {place.job.dataset}"
        if DistilledDataset(place.distilled).complete:
            sets.setdefault(place.distilled, (name, DistilledDataset(place.distilled)))
        found = ResultStore(place.folder / "results.jsonl").rows()
        wanted = [r for r in found if (r.student, r.student_seed) in place.wanted]
        rows.setdefault(place.folder, [(name, r) for r in wanted])
    return list(sets.values()), [pair for found in rows.values() for pair in found]


def _manifests(experiment: Experiment) -> list[Mapping[str, Any]]:
    sets = {place.distilled: DistilledDataset(place.distilled) for place in experiment.located}
    return [distilled.manifest for distilled in sets.values() if distilled.complete]


def _other_protocols(place: Located) -> set[str]:
    """Names of other folders with scores of the same set, by protocol and its first difference."""
    found = set()
    for path in place.distilled.glob("*/protocol.json"):
        if path.parent == place.folder or not (path.parent / "results.jsonl").is_file():
            continue
        theirs = read_claim(path)["identity"]
        mine = identity.score_identity(place.cfg, choices(place.cfg))
        part = theirs.get("protocol")
        if not isinstance(part, dict) or part.get("choice") != mine["protocol"]["choice"]:
            continue  # another protocol's name is a difference of its own
        values, others = mine["protocol"]["values"], part.get("values", {})
        changed = [k for k in values | others if values.get(k) != others.get(k)]
        changed += [k for k in ("training_precision",) if theirs.get(k) != mine[k]]
        found.add(f"{mine['protocol']['choice']} with another {', '.join(changed[:3])}")
    return found


def _means(
    ours: Mapping[tuple, list[EvalResult]], students: list[str]
) -> dict[tuple[str, str, str, str], list[EvalResult]]:
    groups: dict[tuple[str, str, str, str], list[EvalResult]] = defaultdict(list)
    for (row, dataset, ipc, _), rows in ours.items():
        groups[row, dataset, ipc, MEAN] += rows
    return {key: list(averaged(rows, students)) for key, rows in groups.items()}


def _asked_of_means(asked: Mapping[tuple[str, str, str, str], int]) -> dict[Any, int]:
    return {(row, dataset, ipc, MEAN): n for (row, dataset, ipc, _), n in asked.items()}


def _flat(nested: Mapping[str, Any]) -> dict[tuple[str, str, str, str], Any]:
    """Leaves by row, dataset, ipc and student."""
    return {
        (row, dataset, str(ipc), student): leaf
        for row, datasets in nested.items()
        for dataset, ipcs in datasets.items()
        for ipc, students in ipcs.items()
        for student, leaf in students.items()
    }


def _title(experiment: Experiment) -> str:
    *paper, number = experiment.file.removeprefix("mgd3/").split("/")
    name = number.replace("table", "Table ").replace("figure", "Figure ")
    of = f" of {paper[0].replace('_', ' ')}" if paper else ""
    return f"{name}{of}: {experiment.table.caption}" + " (rehearsal)" * experiment.rehearsal


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="make_tables")
def main(cfg: DictConfig) -> None:
    """Never called: the sweep launches nothing."""


if __name__ == "__main__":
    command(main)

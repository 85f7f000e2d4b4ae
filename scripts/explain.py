"""Where one number of a paper's table comes from: command, folders, protocol, images, values."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from omegaconf import DictConfig

from eval.protocols.recipe import Recipe, Steps
from eval.reports.paper_cell import TableCell
from eval.results.layout import mean_and_std, spoken
from eval.results.rows import order_of
from eval.scoring import missing_rows
from mgd3.config.build import build_protocol
from mgd3.config.cell_command import cell_command
from mgd3.config.grid import FULL, Experiment, Located, Request
from mgd3.config.identity import reads, spelt
from mgd3.config.paper import FAMILIES
from mgd3.config.schema import choices, plain
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.errors import UserError
from scripts.plan import real_images

Place: TypeAlias = tuple[str, str, str]  # row, dataset, IPC

_WHAT = ("row", "dataset", "ipc")
_WIDTH, _INDENT = 80, 11
_NO_CONSTANTS = ("_target_", "name", "version", "family", "reads", "students")


def explain(cfg: DictConfig, request: Request) -> Iterator[str]:
    """Lines that say all there is to know of the cell `cfg.explain`; nothing is started.

    Raises `UserError` for a cell that the table does not have, with those that it has.
    """
    from scripts.make_tables import compared

    if request.only:
        raise UserError("explain names its cell itself: leave only.KEY out")
    experiment = Experiment(request.name, request.overrides, None, cfg.rehearsal)
    place, student = _asked(str(cfg.explain), experiment)
    yield ", ".join([experiment.name, place[0], place[1], f"ipc {place[2]}"])
    command = cell_command(experiment, *place, experiment.overrides)
    if command is None:
        yield from _item(
            "command", ["none: no code of this method is here; the paper's number alone"]
        )
        yield from _item("paper", _printed(experiment, place, student))
        return
    yield from _item("command", [command])
    only = {key: [value] for key, value in zip(_WHAT, place, strict=True)}
    cell = Experiment(request.name, request.overrides, only, cfg.rehearsal)
    for row, why in cell.unfit.items():
        raise UserError(f"row «{row}» cannot be run so: {why}")
    first = cell.located[0]
    folders = order_of(str(located.distilled.parent) for located in cell.located)
    yield from _item("folder", folders)
    yield from _item("runs", [_state(located) for located in cell.located])
    yield from _item("made by", list(_making(first)))
    yield from _item("protocol", list(_protocol(first)))
    yield from _item("images", _images(cell.located))
    found = [c for c in compared(cell).cells if student in (None, c.student)]
    yield from _item("ours", [_measured(c) for c in found])
    yield from _item("paper", _printed(experiment, place, student))
    for c in found:
        if c.paper and c.difference is not None:
            verdict = f", {c.verdict}" if c.verdict else ""
            yield from _item("difference", [f"{c.student}: {c.difference:+.1f}{verdict}"])


def _measured(cell: TableCell) -> str:
    """A student's accuracies in a cell, and how many of how many there are."""
    best, last = cell.score("top1_best"), cell.score("top1_last")
    if not best or not last:
        return f"{cell.student}: none of {cell.asked} students yet"
    return (
        f"{cell.student}: best test {mean_and_std(*best)}, last epoch {mean_and_std(*last)}, "
        f"n = {len(cell.ours)} of {cell.asked}"
    )


def _making(place: Located) -> Iterator[str]:
    """What the images are made by: the choice of each group that they depend on, its values."""
    chosen = choices(place.cfg)
    for group in order_of(["method", *reads(place.cfg)]):
        values = place.cfg.get(group)
        if group == "dataset" or not isinstance(values, DictConfig):
            continue
        constants = [f"{k}={spelt(v)}" for k, v in _flat(plain(values)) if k not in _NO_CONSTANTS]
        of_it = f": {', '.join(constants)}" if constants else ""
        yield from _wrapped(f"{group}={chosen[group]}{of_it}")


def _item(name: str, lines: Sequence[str]) -> Iterator[str]:
    """A heading in the margin; lines are not broken, so that they can be copied."""
    for k, line in enumerate(lines):
        yield f"{name if k == 0 else '':<{_INDENT}}{line}"


def _asked(text: str, experiment: Experiment) -> tuple[Place, str | None]:
    """The cell that a text names, and its student if it names one."""
    table = experiment.table
    places = [(j.row, j.dataset, j.ipc) for j in experiment.jobs]
    places += [
        (row, dataset, str(ipc))
        for row, datasets in table.published.items()
        for dataset, ipcs in datasets.items()
        for ipc in ipcs
    ]
    places = order_of(places)
    parts = [part.strip() for part in text.split(",")]
    student = parts.pop() if len(parts) > 3 and parts[-1] in experiment.students else None
    known = {what: order_of(p[k] for p in places) for k, what in enumerate(_WHAT)}
    if len(parts) < 3:
        raise UserError(
            f'explain={text!r} names no cell; write explain="ROW, DATASET, IPC", such as '
            f'"{", ".join(places[0])}". {_there(known, {})}'
        )
    given = {
        "row": ", ".join(parts[:-2]),
        "dataset": parts[-2],
        "ipc": parts[-1].removeprefix("ipc").strip(),
    }
    for what, value in given.items():  # as people write them: a case apart is the same
        same = [k for k in known[what] if k.casefold() == value.casefold()]
        given[what] = same[0] if len(same) == 1 else value
    place = (given["row"], given["dataset"], given["ipc"])
    if unknown := [f"{what} «{v}»" for what, v in given.items() if v not in known[what]]:
        raise UserError(
            f"{experiment.name} has no {' and no '.join(unknown)}. {_there(known, given)}"
        )
    if place not in places:
        own = "; ".join(f"{p[1]}, {p[2]}" for p in places if p[0] == place[0])
        raise UserError(
            f"row «{place[0]}» of {experiment.name} has no cell at {place[1]}, ipc {place[2]}; its "
            f"cells: {own}"
        )
    return place, student


def _there(known: Mapping[str, Sequence[str]], given: Mapping[str, str]) -> str:
    """What exists, nearest to what was given first."""
    parts = []
    for what, values in known.items():
        nearest = sorted(values, key=lambda v: -_likeness(v, given.get(what, "")))
        parts.append(
            f"{what}s: {', '.join(nearest)}" if what != "ipc" else f"ipc: {', '.join(nearest)}"
        )
    return "There are " + "; ".join(parts)


def _likeness(one: str, other: str) -> float:
    if one.isdigit() and other.isdigit():
        return 1 / (1 + abs(int(one) - int(other)))
    return difflib.SequenceMatcher(None, one.casefold(), other.casefold()).ratio()


def _state(place: Located) -> str:
    """One run: its seed, what of it is done, and its folder."""
    missing = missing_rows(place.folder, list(place.wanted))
    made = DistilledDataset(place.distilled).complete
    done = len(place.wanted) - len(missing)
    if made and not missing:
        state = "done"
    elif made:
        state = f"images made, {done} of {len(place.wanted)} students"
    else:
        state = "missing"
    return f"seed {place.job.seed}: {state}, {place.folder.relative_to(place.distilled.parent)}"


def _protocol(place: Located) -> Iterator[str]:
    """Its name, what it comes to in this cell, and its constants."""
    cfg = place.cfg
    chosen = choices(cfg)["protocol"]
    yield f"{cfg.protocol.name}, configs/protocol/{chosen}.yaml"
    notes: set[str] = set()
    real = real_images(cfg, notes)
    if real is not None:
        ipc = max(real) if place.job.ipc == FULL else cfg.ipc
        for student in order_of(student for student, _ in place.wanted):
            recipe = build_protocol(cfg).recipe(ipc, len(real), student)
            yield f"{_student(student, place.wanted)}:"
            yield from _wrapped(_in_words(recipe))
    constants = [f"{k}={spelt(v)}" for k, v in _flat(plain(cfg.protocol)) if k not in _NO_CONSTANTS]
    yield from _wrapped(", ".join(constants))
    yield from (line for note in sorted(notes) for line in _wrapped(note))


def _student(student: str, wanted: Mapping[tuple[str, int], str]) -> str:
    """A student's name, for which of the table's it stands, and its seeds in each set."""
    names = order_of(shown for (name, _), shown in wanted.items() if name == student)
    seeds = order_of(str(seed) for name, seed in wanted if name == student)
    stands = "" if names == [student] else f", in place of {', '.join(names)}"
    return f"{student}{stands}, student seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"


def _in_words(recipe: Recipe) -> str:
    values = asdict(recipe)
    schedule, tests = recipe.schedule, len(recipe.tests)
    for key in ("schedule", "tests"):
        del values[key]
    parts = [f"{key.replace('_', ' ')} {value}" for key, value in values.items()]
    if isinstance(schedule, Steps):
        after = ", ".join(map(str, schedule.milestones))
        parts.append(f"lr times {schedule.gamma:g} after epochs {after}")
    else:
        parts.append(f"cosine to zero over {schedule.period:g} epochs")
    return ", ".join([*parts, f"{tests} tests"])


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)


def _images(places: Sequence[Located]) -> list[str]:
    """How many of each class, and where."""
    ipc = "all real images" if places[0].job.ipc == FULL else f"{places[0].cfg.ipc} images"
    folders = order_of(str(place.distilled / "images") for place in places)
    return [f"{ipc} per class, in a folder for each class below", *folders]


def _printed(experiment: Experiment, place: Place, student: str | None) -> list[str]:
    """The paper's number for each student, with what is known of it."""
    row, dataset, ipc = place
    of_row = experiment.table.published.get(row, {}).get(dataset, {})
    of_ipc: Iterator[Mapping[str, Any]] = (of for key, of in of_row.items() if str(key) == ipc)
    found = []
    for name, (mean, std) in next(of_ipc, {}).items():
        if student in (None, name):
            number = f"{mean:.1f}" if std is None else mean_and_std(mean, std)
            found.append(f"{name}: {number}")
    if not found:
        return [f"no number for {dataset}, {spoken('ipc', ipc)} in this row"]
    family = experiment.table.family_of(row)
    found += _wrapped(f"under {family}: {FAMILIES[family]}" if family else "")
    bands = experiment.table.bands.get(row, {}).get(dataset, {})
    for name, (low, high) in next((of for k, of in bands.items() if str(k) == ipc), {}).items():
        found += _wrapped(f"{name}: means from {low:g} to {high:g} count as reproduced")
    if experiment.rehearsal:
        found += _wrapped("a rehearsal's numbers do not compare with it")
    if row in experiment.table.errata:
        found += _wrapped(experiment.table.errata[row])
    return found

"""The table of result rows: mean, spread and paired differences, and what its numbers are."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.text import Text

from eval.results.cells import Cell, cells, in_order, places
from eval.results.layout import NONE, Layout, folded, mean_and_std
from eval.results.rows import UNGUIDED, EvalResult, order_of
from eval.results.statistics import Difference, paired, scores_by_set
from mgd3.runtime.text import markdown_text


def layout(rows: Sequence[EvalResult]) -> Layout:
    """Cells as text, methods of one student side by side."""
    found = in_order(cells(rows))
    differences = minus_unguided(rows, found)
    columns = places(found) | {
        "method": [c.method for c in found],
        "top1_last": [mean_and_std(c.top1_last_mean, c.top1_last_std) for c in found],
        "top1_best": [mean_and_std(c.top1_best_mean, c.top1_best_std) for c in found],
        "n": [str(c.n) for c in found],
    }
    if any(differences):
        columns[f"minus {UNGUIDED}"] = [str(d) if d else "" for d in differences]
    return folded("", columns)


def minus_unguided(rows: Sequence[EvalResult], found: Sequence[Cell]) -> list[Difference | None]:
    """Each cell's `top1_last` minus that of its place's unguided method, by distillation seed.

    None without a pair, or where there is not one such method, as far as known of the same real
    images, and with students trained as long.
    """
    epochs = {cell: {r.epochs for r in cell.rows(rows)} for cell in found}
    differences: list[Difference | None] = []
    for cell in found:
        others = [
            c
            for c in found
            if c.role == UNGUIDED and c.place == cell.place and _alike(c, cell)
            if epochs[c] == epochs[cell]
        ]
        if len(others) != 1 or others[0] is cell:
            differences.append(None)
            continue
        pair = (scores_by_set(c.rows(rows)) for c in (cell, others[0]))
        differences.append(paired(*pair))
    return differences


def markdown(rows: Sequence[EvalResult]) -> str:
    """The table as Markdown, with a line that says what the numbers are."""
    return f"{layout(rows).markdown()}\n{markdown_text(explanation(rows))}\n"


def terminal(rows: Sequence[EvalResult]) -> Group:
    """The table for a terminal, and what its numbers are."""
    return Group(layout(rows).for_terminal(), Text(explanation(rows)))


def explanation(rows: Sequence[EvalResult]) -> str:
    """What the table's numbers are, and what a reader must not do with them."""
    text = (
        "Top-1 accuracy in percent on the real test images, mean ± population std over n trained "
        "students (distillation seeds x student seeds); top1_last after the last epoch, top1_best "
        f"the best of all tests. «minus {UNGUIDED}» is the difference of top1_last, paired by "
        f"distillation seed, with a 95 % t-interval. {NONE}: one value, or one pair, has no spread."
    )
    return " ".join([text, *notes(rows)])


def notes(rows: Sequence[EvalResult]) -> list[str]:
    """What a reader must know of these rows: the data, the teachers, several commits."""
    found = [f"Note: {n}." for n in order_of(r.dataset_note for r in rows if r.dataset_note)]
    taught = [r for r in rows if r.teacher]
    for teacher, source, top1 in order_of(
        (r.teacher, r.teacher_source, r.teacher_top1) for r in taught
    ):
        accuracy = "an unknown share" if top1 is None else f"{top1:.1f} %"
        named = teacher if source is None else f"{teacher} ({source})"
        found.append(f"Teacher {named}: {accuracy} of the real test images.")
    for dataset in order_of(r.dataset for r in rows):
        if _several_data([r for r in rows if r.dataset == dataset]):
            found.append(f"Warning: rows of different real images of {dataset} stand here.")
    if any(" #" in cell.method for cell in cells(rows)):
        found.append(
            "Methods told apart by «#» differ in other values: by=KEY of scripts/report.py and "
            "scripts/compare.py names them by one."
        )
    commits = order_of(r.commit for r in rows)
    if len(commits) > 1:
        found.append(f"Warning: rows of {len(commits)} commits stand here: {', '.join(commits)}.")
    for what, names in _circumstances(rows).items():
        found.append(
            f"Warning: rows of different {what} stand here ({'; '.join(names)}): the same student "
            "may score apart by rounding."
        )
    return found


def _circumstances(rows: Sequence[EvalResult]) -> dict[str, list[str]]:
    """What the rows were not all trained with, as far as known."""
    several = {}
    for what, key in (
        ("machines", "machine"), ("thread counts", "threads"), ("versions", "versions"),
        ("compute.deterministic", "deterministic"), ("compute.compile", "compiled"),
        ("compute.channels_last", "channels_last"),
    ):  # fmt: skip
        values = order_of(v for r in rows if (v := getattr(r, key)) is not None)
        if len(values) > 1:
            several[what] = [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
    return several


def _alike(one: Cell, other: Cell) -> bool:
    """Were both made from the same training images? A method that reads none goes with any."""
    return None in (data := (one.train_data, other.train_data)) or data[0] == data[1]


def _several_data(rows: Sequence[EvalResult]) -> bool:
    """Were these rows of one dataset made from, or tested on, different images, as far as known?"""
    train, test = ({getattr(r, k) for r in rows} for k in ("train_data", "test_data"))
    data = {(r.cell_id, r.train_data, r.test_data) for r in rows}
    of_one_cell = len({cell_id for cell_id, *_ in data}) < len(data)
    return of_one_cell or any(len(found - {None}) > 1 for found in (train, test))

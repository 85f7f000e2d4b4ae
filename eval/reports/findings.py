"""What numbers allow to be said, in sentences: whether guidance shows, in accuracy and in modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from eval.metrics.coverage import SetCoverage, covered_scores, expected_covered
from eval.results.cells import cells
from eval.results.rows import UNGUIDED, EvalResult
from eval.results.statistics import Difference, compare, paired, scores_by_set, units


def sentences(
    rows: Sequence[EvalResult],
    measured: Mapping[str, Sequence[SetCoverage]],
    guided: str,
    images_per_class: int,
) -> list[str]:
    """Hidden modes and accuracy of each method called `guided` against unguided samples.

    [] where there is nothing to compare. Rows are of one dataset, IPC, protocol and student, under
    the names of `measured`.
    """
    names = [name for name in measured if name.split()[0] == guided]
    if not names or not measured.get(UNGUIDED):
        return []
    first = measured[UNGUIDED][0]
    classes = first.images // images_per_class
    by_chance = classes * expected_covered(images_per_class, first.modes // classes)
    shown = ", ".join(
        f"{name} {fmean(units(covered_scores(sets))):.1f}" for name, sets in measured.items()
    )
    found = [
        f"Hidden modes shown, of {first.modes}: {shown}; independent draws that hit all modes "
        f"alike would show {by_chance:.1f}.",
    ]
    for name in names:
        more = compare(covered_scores(measured[name]), covered_scores(measured[UNGUIDED]))
        better = _accuracy(rows, name)
        asked = [
            f"More modes? {verdict(more, 'modes')}",
            f"Better students? {verdict(better, 'points')}" if better else "",
        ]
        found.append(" ".join([f"{name} against {UNGUIDED} samples:", *filter(None, asked)]))
    return found


def verdict(difference: Difference, unit: str) -> str:
    """Yes, no, or that so many sets cannot tell; with the numbers that say so."""
    sets = "1 pair of sets" if difference.n == 1 else f"{difference.n} sets"
    over = f"paired over {sets}" if difference.paired else sets
    numbers = f"{difference.text(2)} {unit}, {over}"
    if difference.low is not None and difference.low > 0:
        return f"Yes: {numbers}."
    if difference.high is not None and difference.high < 0:
        return f"No, fewer: {numbers}." if unit == "modes" else f"No, worse: {numbers}."
    return f"{sets} cannot tell: {numbers}."


def _accuracy(rows: Sequence[EvalResult], guided: str) -> Difference | None:
    by_method = {c.method: scores_by_set(c.rows(rows)) for c in cells(rows)}
    if guided not in by_method or UNGUIDED not in by_method:
        return None
    return paired(by_method[guided], by_method[UNGUIDED])

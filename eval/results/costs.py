"""What each stage cost, from the times that runs keep."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence

from eval.results.layout import Layout
from eval.results.rows import EvalResult, order_of
from mgd3.data.distilled import DistilledDataset
from mgd3.storage.timing import StageTimes


def cost_layout(
    sets: Sequence[tuple[str, DistilledDataset]], rows: Sequence[tuple[str, EvalResult]]
) -> Layout:
    """Mean seconds by name and stage, a column for each IPC; sets and rows come with their names.

    Distillation stages are per set; a shared cache makes the first set pay for the others, so
    their means fall with the number of sets. Training and tests are per student.
    """
    seconds: dict[tuple[str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for method, distilled in sets:
        ipc = distilled.ipc
        for stage, spent in StageTimes(distilled.folder / "times.json").read().items():
            seconds[method, f"{stage}, a set"][ipc].append(spent)
    for method, row in rows:
        for what, spent in (("training", row.train_seconds), ("tests", row.test_seconds)):
            seconds[method, f"{what}, a {row.student}"][row.ipc].append(spent)
    ipcs = sorted({ipc for by_ipc in seconds.values() for ipc in by_ipc})
    methods = order_of(method for method, _ in seconds)
    lines = [
        [method, stage, *(f"{statistics.fmean(by[i]):.2f}" if i in by else "" for i in ipcs)]
        for (method, stage), by in sorted(seconds.items(), key=lambda s: methods.index(s[0][0]))
    ]
    headers = ["method", "stage", *(f"seconds, ipc {i}" for i in ipcs)]
    return Layout(title="mean seconds per stage", headers=headers, lines=lines)

"""Compare finished runs: spread by its source, differences between methods, DD-Ranking's scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig
from rich.console import Console

from eval.results.layout import csv_text
from eval.results.robustness import fairness_layout
from eval.results.rows import CIRCUMSTANCES, EvalResult, ResultStore
from eval.results.statistics import Metric, components_layout, differences_layout
from eval.results.sweeps import keys_of, rows_by
from eval.results.tables import notes
from mgd3.config.schema import CONFIGS
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.text import markdown_text
from mgd3.storage.files import write_atomic

COMPONENTS = (
    "Top-1 in percent on the real test images over n students. std (n) is the papers' np.std, "
    "std (n-1) the sample's. Distillation and student std are variance components (one-way random "
    "effects, ANOVA estimators); * an estimate below zero, set to 0; –: not estimable from so few "
    "sets or students. The 95 % t-interval is of the sets' means."
)
DIFFERENCES = (
    "The first method minus the second, each set's students averaged first, with a 95 % interval: "
    "paired by distillation seed over n seeds, or Welch's over the n sets of both where fewer "
    "than two seeds are shared. One pair of sets, and pairs or sets without any spread, have a "
    "difference and no interval [–]. Of many such intervals one in twenty misses by chance alone. "
    "The last column: how many paired seeds would bring the interval to that many points, were all "
    "to differ as these do; a guess where these are few."
)
_COLUMNS = (  # of the rows' file; the first seven name a student
    "dataset", "ipc", "protocol", "student", "method", "distill_seed", "student_seed",
    "top1_last", "top1_best", "tests", "test_images", "epochs", "commit",
)  # fmt: skip
FAIRNESS = (
    "DD-Ranking's scores in fractions (w = g = 0.5): HLR, below the full set under hard labels; "
    "IOR, above random real images under the same protocol; LRS and ARS lie in [0, 1]."
)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="compare")
def main(cfg: DictConfig) -> None:
    """Read every run below the folders and print three tables."""
    for key in ("markdown", "rows"):
        if cfg[key] and Path(cfg[key]).is_dir():
            raise UserError(f"{key}={cfg[key]} is a folder; name a file")
    metric: Metric = "top1_best" if cfg.best else "top1_last"
    within = checks.number("within", cfg.within, minimum=0.01)
    given = [cfg.folders] if isinstance(cfg.folders, str) else cfg.folders
    folders, keys = [Path(folder) for folder in given], keys_of(cfg.by)
    rows = read_runs(folders)
    if keys:
        rows, _ = rows_by(rows, folders, keys)
    if cfg.rows:
        records = sorted(map(_record, rows), key=_place)
        write_atomic(Path(cfg.rows), csv_text(records).encode())
    sections = [
        (components_layout(rows, metric), " ".join([COMPONENTS, *notes(rows)])),
        (differences_layout(rows, metric, within), DIFFERENCES),
        (fairness_layout(rows, metric), FAIRNESS),
    ]
    sections = [(layout, text) for layout, text in sections if layout.lines]
    if cfg.markdown:
        pages = [f"{layout.markdown()}\n{markdown_text(text)}\n" for layout, text in sections]
        write_atomic(Path(cfg.markdown), "\n".join(pages).encode())
    width = None if sys.stdout.isatty() else 240  # a pipe cuts nothing off
    console = Console(width=width, markup=False)
    for layout, text in sections:
        console.print(layout.for_terminal(), text, "", highlight=False)


def read_runs(folders: Sequence[Path]) -> list[EvalResult]:
    """All rows below the folders; a student that several hold is counted once.

    Raises `UserError` for a folder without results and for two folders that disagree on a student.
    """
    rows: dict[tuple, EvalResult] = {}
    origins: dict[tuple, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder; name one with finished runs below it")
        found = False
        for path in sorted(folder.rglob("results.jsonl")):
            for row in ResultStore(path).rows():
                found = True
                first = origins.setdefault(row.key, path.parent)
                if _scores(rows.setdefault(row.key, row)) != _scores(row):
                    raise UserError(
                        f"{first} and {path.parent} disagree on {row.method}, {row.student}, seeds "
                        f"{row.distill_seed}/{row.student_seed}; leave one of them out"
                    )
        if not found:
            raise UserError(f"{folder} holds no finished run (no results.jsonl with rows below it)")
    return list(rows.values())


def _record(row: EvalResult) -> dict[str, Any]:
    return {key: getattr(row, key) for key in _COLUMNS} | {"method": row.name}


def _place(record: dict[str, Any]) -> tuple[str | int, ...]:
    """What names a student; a method without seeds has its one set first."""
    return tuple(-1 if record[key] is None else record[key] for key in _COLUMNS[:7])


def _scores(row: EvalResult) -> EvalResult:
    """The row without what may differ between two runs of one student."""
    apart: dict[str, Any] = {"train_seconds": 0.0, "test_seconds": 0.0, "run_id": "", "commit": ""}
    return replace(row, **apart | dict.fromkeys(CIRCUMSTANCES))


if __name__ == "__main__":
    command(main)

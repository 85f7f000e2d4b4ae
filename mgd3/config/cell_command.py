"""The command that makes one cell of a paper's table."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from mgd3.config.grid import Experiment, paper_argument
from mgd3.config.identity import spelt

_PLAIN = re.compile(r"[\w.+-]+", re.ASCII)


def cell_command(
    experiment: Experiment, row: str, dataset: str, ipc: str, overrides: Sequence[str]
) -> str | None:
    """As a shell takes it, with `overrides` of run.py; None where nothing makes it.

    A row of which there is no code here has the paper's numbers alone.
    """
    if not any((j.row, j.dataset, j.ipc) == (row, dataset, ipc) for j in experiment.jobs):
        return None
    named = spelt(row) if _PLAIN.fullmatch(row) else f'"{row}"'
    words = [
        "python scripts/reproduce.py",
        paper_argument(experiment.file),
        *(["rehearsal=true"] if experiment.rehearsal else []),
        *(shlex.quote(f"only.{k}={v}") for k, v in zip(_KEYS, (named, dataset, ipc), strict=True)),
        *map(shlex.quote, overrides),
    ]
    return " ".join(words)


_KEYS = ("row", "dataset", "ipc")

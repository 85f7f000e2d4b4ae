"""Summarise a folder of finished runs: the table here, summary.json and report.html there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.report import summarise
from eval.tables import markdown, terminal
from mgd3.artifacts import write_atomic
from mgd3.assembly import dataset_of
from mgd3.config import errors_for_people
from mgd3.types import UserError


def main() -> None:
    """Read every run below the folder and write its summary, table and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with finished runs, such as runs/demo")
    folder = parser.parse_args().folder
    if not any(folder.rglob("results.jsonl")):
        raise UserError(f"{folder} holds no finished run (no results.jsonl below it)")
    dataset = dataset_of(folder)
    rows = summarise(folder, dataset, title=f"{dataset.name}: {folder}")
    write_atomic(folder / "table.md", markdown(rows).encode())
    Console().print(terminal(rows))
    Console().print(f"summary: {folder / 'summary.json'}\nreport:  {folder / 'report.html'}")


if __name__ == "__main__":
    with errors_for_people():
        main()

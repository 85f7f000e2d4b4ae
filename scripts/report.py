"""Summarise a folder of finished runs: the table here, summary.json and report.html there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.report import distilled_sets, summarise
from eval.samples import overview_picture
from eval.tables import markdown, terminal
from mgd3.artifacts import write_atomic
from mgd3.assembly import dataset_of
from mgd3.config import errors_for_people
from mgd3.types import UserError


def main() -> None:
    """Read every run below the folder and write its summary, table and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with finished runs, such as runs/demo")
    parser.add_argument(
        "--picture", type=Path, help="also write this PNG of the first seed's images"
    )
    parser.add_argument("--methods", nargs="+", default=["mgd3", "unguided"], help="its panels")
    parser.add_argument("--no-real", action="store_true", help="without modes and real images")
    options = parser.parse_args()
    folder = options.folder
    if not any(folder.rglob("results.jsonl")):
        raise UserError(f"{folder} holds no finished run (no results.jsonl below it)")
    dataset = dataset_of(folder)
    rows = summarise(folder, dataset, title=f"{dataset.name}: {folder.resolve().name}")
    write_atomic(folder / "table.md", markdown(rows).encode())
    if options.picture:
        picture = overview_picture(distilled_sets(folder), options.methods, not options.no_real)
        write_atomic(options.picture, picture)
    Console().print(terminal(rows))
    Console().print(f"summary: {folder / 'summary.json'}\nreport:  {folder / 'report.html'}")


if __name__ == "__main__":
    with errors_for_people():
        main()

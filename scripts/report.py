"""Summarise a folder of finished runs: the table here, summary.json and report.html there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.reports.run_report import distilled_sets, named, write_report, write_summary
from eval.reports.samples import overview_picture
from eval.results.costs import cost_layout
from eval.results.rows import read_results
from eval.results.sweeps import rows_by, sweep_picture
from eval.results.tables import markdown, terminal
from mgd3.config.build import dataset_of
from mgd3.config.schema import errors_for_people
from mgd3.runtime.errors import UserError
from mgd3.runtime.files import write_atomic


def main() -> None:
    """Read every run below the folder and write its summary, table and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder with finished runs, such as runs/demo")
    parser.add_argument(
        "--picture", type=Path, help="also write this PNG of the first seed's images"
    )
    parser.add_argument("--methods", nargs="+", default=["mgd3", "unguided"], help="its panels")
    parser.add_argument("--no-real", action="store_true", help="without modes and real images")
    parser.add_argument("--by", metavar="KEY", help="name methods by this key's values: a sweep")
    parser.add_argument("--plot", type=Path, help="with --by: a PNG of accuracy against the key")
    options = parser.parse_args()
    if options.plot and not options.by:
        parser.error("--plot needs --by KEY, the horizontal axis")
    folder = options.folder
    if not any(folder.rglob("results.jsonl")):
        raise UserError(f"{folder} holds no finished run (no results.jsonl below it)")
    dataset = dataset_of(folder)
    rows = read_results(folder)
    if options.by:
        rows, values = rows_by(folder, options.by)
        if options.plot:
            write_atomic(options.plot, sweep_picture(rows, values, options.by))
    title = f"{dataset.name}: {folder.resolve().name}"
    write_summary(folder / "summary.json", rows)
    sets = distilled_sets(folder)
    write_report(folder / "report.html", rows, sets, dataset, title)
    costs = cost_layout(*named(sets, rows)).markdown()
    write_atomic(folder / "table.md", f"{markdown(rows)}\n{costs}".encode())
    if options.picture:
        picture = overview_picture(sets, options.methods, not options.no_real)
        write_atomic(options.picture, picture)
    Console().print(terminal(rows))
    Console().print(f"summary: {folder / 'summary.json'}\nreport:  {folder / 'report.html'}")


if __name__ == "__main__":
    with errors_for_people():
        main()

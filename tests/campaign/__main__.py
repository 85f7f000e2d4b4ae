"""python -m campaign [PART ...] [--quick]: exit code 1 unless all ended right."""

import argparse
import importlib
import importlib.util
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from campaign.processes import Outcome, preload

PARTS = ("kills", "races", "signals", "inputs")
WORKERS = 2


def campaign(parts: list[str], quick: bool, work: Path) -> int:
    """Run the parts, say how each ended and what was not right; the exit code."""
    console, summary, wrong = Console(soft_wrap=True), [], []
    for name in parts:
        part, began = importlib.import_module(f"campaign.{name}"), time.monotonic()
        found: list[Outcome] = []
        columns = TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(name, total=None)
            for outcome in part.outcomes(work / name, quick, WORKERS):
                found.append(outcome)
                if not outcome.good:
                    bar.console.print(f"{outcome.name}: {outcome.said}", markup=False)
                bar.update(task, description=f"{name}: {len(found)}, {outcome.name}")
            bar.update(task, description=f"{name}: {len(found)}")
        good, seconds = sum(outcome.good for outcome in found), time.monotonic() - began
        summary.append(f"{good} of {len(found)} {part.WHAT} {part.RIGHT} ({seconds:.0f} s)")
        wrong += [outcome for outcome in found if not outcome.good]
        wrong += [] if found else [Outcome(name, False, "nothing was tried")]
    if wrong:
        console.print("\nnot right:")
        for outcome in wrong:
            console.print(f"  {outcome.name}: {outcome.said}", markup=False)
    console.print(*summary, sep="\n")
    return int(bool(wrong))


def main() -> int:
    """Arguments, and a folder for the cases that is kept if something was wrong."""
    there = [p for p in PARTS if importlib.util.find_spec(f"campaign.{p}")]
    parser = argparse.ArgumentParser(prog="python -m campaign", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(there)}")
    parser.add_argument("--quick", action="store_true", help="a few cases of each part")
    chosen = parser.parse_args()
    if unknown := [p for p in chosen.parts if p not in there]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(there)}")
    preload(networks=not chosen.quick)
    work = Path(tempfile.mkdtemp(prefix="campaign-"))
    code = campaign(chosen.parts or there, chosen.quick, work)
    if code:
        print(f"the folders of what was not right: {work}")
    else:
        shutil.rmtree(work)
    return code


if __name__ == "__main__":
    sys.exit(main())

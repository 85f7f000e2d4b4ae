"""experiment=demo as two processes of one thread each, under one bar, then the report (make demo).

python scripts/demo.py                 runs below runs/demo
python scripts/demo.py seed=0,1        two sets of each method, not ten; make demo ARGS="seed=0,1"
python scripts/demo.py runs=FOLDER     what else is given goes to both sweeps (run.py --help)

Writes the runs, their report and both logs below runs/demo.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mgd3.runtime.stopping import listen

listen()

from mgd3.config.command import errors_for_people
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import progress
from mgd3.runtime.screen import ScreenHandler

SWEEPS = (["method=random,unguided"], ["method=mgd3", "guidance.stop_t=25,0"])
_BY = "guidance.stop_t"
_LAUNCHING = re.compile(r"Launching (\d+) jobs")
_LAST_LINES = 12  # of a sweep that failed


class Sweep:
    """One process of run.py, whose lines go into a file."""

    def __init__(self, overrides: Sequence[str], log: Path) -> None:
        self.log, self.jobs = log, SimpleQueue[int]()
        self._command = [sys.executable, str(ROOT / "run.py"), "-m", "experiment=demo", *overrides]
        self.process = subprocess.Popen(
            self._command,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def follow(self, finished: SimpleQueue[int]) -> int:
        """Keep its lines, tell of each finished run; its exit status."""
        assert self.process.stdout is not None
        with self.process, self.log.open("w") as file:
            for line in self.process.stdout:
                file.write(line)
                if found := _LAUNCHING.search(line):
                    self.jobs.put(int(found.group(1)))
                elif "] results: " in line:
                    finished.put(1)
        self.jobs.put(0)
        finished.put(0)
        return self.process.returncode

    def failure(self) -> str:
        """What its last lines say."""
        last = self.log.read_text().splitlines()[-_LAST_LINES:]
        return f"a sweep has failed; {self.log} says: {' / '.join(last)}"


def main(arguments: Sequence[str]) -> None:
    """Run both sweeps, then summarise them."""
    given = dict(argument.partition("=")[::2] for argument in arguments)
    runs = Path(given.get("runs", "runs/demo"))
    runs.mkdir(parents=True, exist_ok=True)
    print(
        "even and odd digits, 5 images of each: random real ones, plain samples, MGD3's", flush=True
    )
    sweeps = [
        Sweep([*overrides, *arguments], runs / f"sweep{number}.log")
        for number, overrides in enumerate(SWEEPS, 1)
    ]
    codes = follow(sweeps)
    for sweep, code in zip(sweeps, codes, strict=True):
        if code:
            raise UserError(sweep.failure())
    report = [sys.executable, str(ROOT / "scripts/report.py"), f"folder={runs}", f"by={_BY}"]
    sys.exit(subprocess.run(report, check=False).returncode)


def follow(sweeps: Sequence[Sweep]) -> list[int]:
    """One bar over the runs of all sweeps, which end with this process; their exit statuses."""
    finished: SimpleQueue[int] = SimpleQueue()
    with ThreadPoolExecutor(len(sweeps)) as pool:
        ended = [pool.submit(sweep.follow, finished) for sweep in sweeps]
        try:
            _show(sweeps, finished)
        except BaseException:
            for sweep in sweeps:
                sweep.process.terminate()
            raise
        return [code.result() for code in ended]


def _show(sweeps: Sequence[Sweep], finished: SimpleQueue[int]) -> None:
    left, total = len(sweeps), sum(sweep.jobs.get() for sweep in sweeps)
    with progress("two processes of one thread", total, "runs") as advance:
        while left:
            done = finished.get()
            left -= done == 0
            advance(done)


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(print(__doc__))
    logging.basicConfig(level=logging.INFO, handlers=[ScreenHandler()], format="%(message)s")
    with errors_for_people():
        main(sys.argv[1:])

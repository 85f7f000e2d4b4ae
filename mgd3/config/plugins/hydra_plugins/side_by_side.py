"""Runs handed to Hydra's launcher; one bar over those that it starts in other processes here."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Event, Thread

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from mgd3.runtime.progress import progress
from mgd3.runtime.screen import listening

log = logging.getLogger(__name__)

# Launchers whose processes run on this machine while the sweep waits: hydra/launcher=joblib and
# submitit_local. What SLURM runs cannot be heard from here.
_HERE = ("JoblibLauncher", "LocalLauncher")
_SECONDS = 0.2  # between two looks


def launch(launcher: Launcher, jobs: Sequence[Sequence[str]]) -> Sequence[JobReturn]:
    """Run every job, a list of overrides, as `hydra/launcher` says."""
    each = [list(job) for job in jobs]
    elsewhere = type(launcher).__name__ in _HERE
    with _followed("runs side by side", len(each)) if elsewhere else nullcontext():
        # joblib begins a process anew once its memory has grown, and warns: no run is lost by it
        warnings.filterwarnings("ignore", "A worker stopped while some jobs were given")
        return launcher.launch(each, initial_job_idx=0)


@contextmanager
def _followed(description: str, total: int) -> Iterator[None]:
    """A bar over `total` runs that processes of the block `tell` of."""
    ended = Event()
    with listening() as path, progress(description, total, "runs") as advance:
        watcher = Thread(target=_watch, args=(path, ended, advance), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def _watch(path: Path, ended: Event, advance: Callable[..., None]) -> None:
    """Move the bar by the lines of the file; a failure is said at once."""
    with path.open() as file:
        last = False
        while True:
            for line in file:
                run, error = json.loads(line)
                if error:
                    log.error("%s has failed: %s", run, error)
                advance(1, note=run)
            if last:
                return
            last = ended.wait(_SECONDS)  # and one look more: the last runs may just have ended

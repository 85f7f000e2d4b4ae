"""Processes forked from one that has imported everything, and what a folder holds afterwards."""

import hashlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from conftest import run

# Two cases at a time, a thread each: what they compute must not depend on who else computes.
os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")

CASES = multiprocessing.get_context("forkserver")
_IMPORTS = (
    "conftest", "scripts.run_cell", "sklearn.datasets", "sklearn.cluster", "scipy.optimize",
    "eval.reports.run_report", "eval.external", "mgd3.backbones.toy", "mgd3.modes.finders",
    "matplotlib.backends.backend_agg", "campaign.processes",
)  # fmt: skip
_OF_NETWORKS = (
    "mgd3.backbones.dit", "mgd3.finetuning.from_scratch", "mgd3.storage.checkpoints",
    "mgd3.backbones.weights.download", "eval.reports.drawings.curves", "scripts.make_tables",
)  # fmt: skip


def preload(networks: bool) -> None:
    """Import once what cases need, before the first of them; diffusers only for `networks`."""
    more = _OF_NETWORKS if networks else ()
    CASES.set_forkserver_preload([*_IMPORTS, *more, "campaign.warm"])


preload(networks=False)

NOBODY = 65534
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_CHANGES = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One case: what it was, whether it ended right, and if not, what it said."""

    name: str
    good: bool
    said: str = ""


@dataclass(frozen=True)
class Finished:
    """A process that has ended: its code, negative for a signal, None for one that hung."""

    returncode: int | None
    stdout: str
    stderr: str
    changes: int = 0  # of the file system below its folder, where they were counted

    @property
    def last_words(self) -> str:
        """The end of what it said, for people."""
        return " | ".join((self.stderr or self.stdout).strip().splitlines()[-3:])[-500:]


def child(
    cwd: Path,
    *overrides: str,
    script: str = "run.py",
    kill_at: int | None = None,
    kill_after: float | None = None,
    signal_when: tuple[Callable[[], bool], signal.Signals] | None = None,
    as_nobody: bool = False,
    file_limit: int | None = None,
    checkpoint_seconds: float | None = None,
    timeout: float = 120,
    **environment: str | None,
) -> Finished:
    """The finished process of `python SCRIPT OVERRIDES` in `cwd`.

    `kill_at` ends it by SIGKILL before its k-th change of the file system below `cwd`; 0 counts
    them only. `kill_after` does so after some seconds. `signal_when` is a moment, asked for again
    and again, and what is sent then. `as_nobody` makes file permissions count for root as well.
    `file_limit` is the most bytes a file may have (ulimit -f).
    `checkpoint_seconds` is how often students write checkpoints.
    """
    with tempfile.TemporaryDirectory() as said:
        job = {
            "cwd": cwd, "overrides": overrides, "script": script, "kill_at": kill_at,
            "as_nobody": as_nobody, "file_limit": file_limit,
            "checkpoint_seconds": checkpoint_seconds,
            "environment": environment,
        }  # fmt: skip
        process = CASES.Process(target=_case, args=(Path(said), job))
        process.start()
        if kill_after is not None:
            signal_when = (_after(kill_after), signal.SIGKILL)
        _watch(process, signal_when, timeout)
        hung = process.is_alive()
        if hung:
            process.kill()
        process.join()
        out, err, changes = (
            (Path(said) / name).read_text() if (Path(said) / name).is_file() else ""
            for name in ("stdout", "stderr", "changes")
        )
        code = None if hung else process.exitcode
        process.close()
        return Finished(code, out, err, int(changes or 0))


def _after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _watch(
    process: multiprocessing.Process,
    signal_when: tuple[Callable[[], bool], signal.Signals] | None,
    timeout: float,
) -> None:
    """Wait for the end, for `timeout` seconds at most; send the signal at its moment."""
    end = time.monotonic() + timeout
    if signal_when is not None:
        moment, number = signal_when
        while process.is_alive() and time.monotonic() < end:
            if moment():
                os.kill(process.pid, number)
                break
            time.sleep(0.002)
    process.join(max(0, end - time.monotonic()))


def _case(said: Path, job: dict) -> None:
    """What the forked process does; it leaves no other way than `os._exit`."""
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            handle = os.open(said / name, os.O_WRONLY | os.O_CREAT, 0o644)
            os.dup2(handle, number)
        made = (said / "changes").open("w")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
        if job["as_nobody"] and os.geteuid() == 0:
            importlib.import_module("campaign.warm")  # what is imported late may be root's alone
            os.setegid(NOBODY)
            os.seteuid(NOBODY)
        if job["checkpoint_seconds"] is not None:
            training = importlib.import_module("eval.protocols.training")
            training._CHECKPOINT_SECONDS = job["checkpoint_seconds"]
        most = resource.getrlimit(resource.RLIMIT_FSIZE)
        if job["file_limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], most[1]))
        counted = None
        if job["kill_at"] is not None:
            counted = _die_at(job["kill_at"], str(job["cwd"].resolve()))
        done = run(
            job["cwd"], *job["overrides"], script=job["script"], **job["environment"]
        )  # fmt: skip
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
        if counted is not None:
            made.write(str(counted[0]))
        made.close()
        os.write(1, done.stdout.encode())
        os.write(2, done.stderr.encode())
        code = done.returncode
    finally:
        os._exit(code)


def _die_at(last: int, folder: str) -> list[int]:
    """Die before the change number `last` of what lies below `folder`; their number so far."""
    changes, so_far, inside = count(1), [0], folder + os.sep

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            if not isinstance(args[2], int) or not args[2] & _WRITES:
                return
        elif event not in _CHANGES:
            return
        path = args[0]
        if isinstance(path, int):  # opened, and counted, by name before
            return
        if not os.path.abspath(os.fsdecode(path)).startswith(inside):
            return
        so_far[0] = next(changes)
        if so_far[0] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return so_far


# What differs from one run of a command to the next, and is no part of its result.
_UNLIKE_FOLDERS = ("pace", ".hydra", "wandb", ".submitit")
_UNLIKE_FILES = ("times.json", "multirun.yaml")
_PAGES = "tables/*/report.html"  # the paper's tables, beside what each run took
_SEEN = "inventory/sets/*"  # when a finished set's files were looked at, by place and time
_UNLIKE_KEYS = ("machine", "seconds")


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` by path; of JSON, what is no time and no machine."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if (
            not path.is_file()
            or path.suffix in (".log", ".lock", ".tmp")
            or name.name == ".lock"
            or name.name in _UNLIKE_FILES
            or name.match(_PAGES)
            or any(part in _UNLIKE_FOLDERS for part in name.parts)
            or name.match(_SEEN)
        ):
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            data = _alike(json.loads(data))
        elif path.suffix == ".jsonl":  # students of several processes end in any order
            data = b"\n".join(sorted(_alike(json.loads(line)) for line in data.splitlines()))
        elif path.suffix == ".sha256":  # written as images are done
            data = b"\n".join(sorted(data.splitlines()))
        found[str(name)] = hashlib.sha256(data).hexdigest()
    return found


def _alike(value: object) -> bytes:
    return json.dumps(_without_times(value), sort_keys=True).encode()


def _without_times(value: object) -> object:
    if isinstance(value, list):
        return [_without_times(v) for v in value]
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if not k.endswith(_UNLIKE_KEYS)}
    return value


def differences(folder: Path, expected: dict[str, str]) -> str:
    """What a folder lacks, has besides or otherwise, and temporary files; "" if there is none."""
    found = content(folder)
    said = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    said += [f"{name} is new" for name in sorted(found.keys() - expected.keys())]
    said += [
        f"{n} differs" for n in sorted(found.keys() & expected.keys()) if found[n] != expected[n]
    ]
    said += [f"{path.relative_to(folder)} is left" for path in sorted(folder.rglob("*.tmp"))]
    return "; ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")


def at_once(tasks: Iterable[Callable[[], Outcome]], workers: int) -> Iterator[Outcome]:
    """Outcomes of tasks, `workers` at a time, in order."""
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(lambda task: task(), tasks)


def together(*starts: Callable[[], Finished]) -> list[Finished]:
    """What processes come to that are started at once."""
    ready = threading.Barrier(len(starts))

    def start(one: Callable[[], Finished]) -> Finished:
        ready.wait()
        return one()

    with ThreadPoolExecutor(len(starts)) as pool:
        return list(pool.map(start, starts))

"""The command line: one dialect for every script, and errors that people can act on."""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mgd3.config.arguments import understood
from mgd3.config.identity import choices_with, register
from mgd3.config.schema import CONFIGS, ROOT
from mgd3.config.scripts import SCRIPTS, Script
from mgd3.runtime import checks
from mgd3.runtime.errors import CorruptFileError, UserError, first_line
from mgd3.runtime.stopping import Stopped, received
from mgd3.runtime.text import one_line
from mgd3.storage.files import REFUSALS

# The first is GNU OpenMP's, which PyTorch's Linux builds use; OpenMP's own; Intel's
_HOW_THREADS_WAIT = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def start() -> None:
    """Understand what was typed: call it before what takes seconds to load.

    Prints help, completes a shell's words, and refuses what this script does not read.
    """
    _let_threads_sleep()
    script = _this()
    given = sys.argv[1:]
    with errors_for_people(script.resumes):
        if {"-h", "--help"} & set(given):
            print(script.help(), flush=True)  # here, where a pipe that was closed is no error
            sys.exit()
        if {"-sc", "--shell_completion"} & set(given):
            _complete(given, script)
            sys.exit()
        sys.argv[1:] = understood(given, script)


def _let_threads_sleep() -> None:
    """OpenMP's threads soon sleep while they wait, unless the environment says how they wait.

    By default they spin, which takes a whole core from whatever runs beside this process. To sleep
    at once (OMP_WAIT_POLICY=passive) costs small networks half of their speed where nothing does
    (docs/speed.md). Read once, when torch is loaded.
    """
    if not any(os.environ.get(name) for name in _HOW_THREADS_WAIT):
        os.environ[_HOW_THREADS_WAIT[0]] = "1000"  # turns of a loop


def _complete(given: list[str], script: Script) -> None:
    """A shell's question for what a word may become; the function that asks is Hydra's."""
    line = os.environ.get("COMP_LINE", "")
    word = line[: int(os.environ.get("COMP_POINT", len(line)))].rpartition(" ")[2]
    if any(argument.startswith("query=") for argument in given) and re.fullmatch(r"\w*", word):
        print("\n".join(script.completions(word)))  # Hydra composes once for each group
    else:
        register()
        hydra.main(version_base="1.3", config_path=CONFIGS, config_name=script.name)(_nothing)()


def command(main: Callable[[], None]) -> None:
    """Run a script's Hydra main; what its user can mend is said in one line."""
    register()
    logging.raiseExceptions = False  # a full disk loses a line of the log, not the screen
    with errors_for_people(_this().resumes):
        main()


def _this() -> Script:
    """The script that this process runs."""
    return SCRIPTS[Path(sys.argv[0]).stem]


def _nothing(cfg: DictConfig) -> None:
    """What Hydra runs where it completes words: never called."""


@contextmanager
def errors_for_people(resumes: bool = True) -> Iterator[None]:
    """Print what a user can mend in one paragraph, exit with 1; a bug shows its traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra swallows the exception's type
    try:
        with _without_hydras_line():
            yield
            sys.stdout.flush()  # or a closed pipe shows when nobody answers it any more
    except UserError as error:
        _exit(str(error))
    except CorruptFileError as error:
        _exit(f"{error}; delete it and run the same command to make it again")
    except (HydraException, OmegaConfBaseException) as error:
        _exit(str(_mistake_behind(error) or explained(error)))
    except BrokenPipeError:  # whoever read what is printed has seen enough, as with «| head»
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if not (error.errno in REFUSALS or _raised_by_hydra(error)):
            raise
        reason = REFUSALS.get(error.errno or 0, f"{error.strerror}; choose another hydra.run.dir")
        _exit(f"{error.filename or 'a file of this run'}: {reason}")
    except (RuntimeError, MemoryError) as error:
        if (sentence := _sentence_for(error)) is None:
            raise
        _exit(sentence)
    except KeyboardInterrupt as error:
        _end(error.signal if isinstance(error, Stopped) else signal.SIGINT, resumes)
    except Exception:
        if not received():  # else what a process leaves behind that others waited for
            raise
        _end(received(), resumes)


def _sentence_for(error: Exception) -> str | None:
    """What PyTorch raised and a user can mend; None for anything else, such as a bug."""
    if "does not have a deterministic implementation" in str(error):
        operation = str(error).split(" does not have")[0]
        return (
            f"compute.deterministic=true: {operation} has no deterministic form on this device; "
            "take compute.device=cpu or another student, or leave compute.deterministic=false"
        )
    from mgd3.runtime.batching import memory_words, ran_out_of_memory

    if ran_out_of_memory(error):
        return f"out of memory ({first_line(error)}){memory_words()}"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = first_line(getattr(error, "inner_exception", error))
        return (
            f"compute.compile: torch.compile failed ({reason}); the same command "
            "with compute.compile=false goes on where this one stopped"
        )
    return None


class _Filter:
    """A stream without the line that Hydra writes before each error: it says nothing of it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As the stream's own, but for that line."""
        unwanted = text.startswith("Error executing job with overrides: ")
        return len(text) if unwanted else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _without_hydras_line() -> Iterator[None]:
    whole = sys.stderr
    sys.stderr = _Filter(whole)
    try:
        yield
    finally:
        sys.stderr = whole


def _end(number: int, resumes: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # of torchrun: the first process says it
        sys.exit(128 + number)
    after = (
        "goes on where this one stopped"
        if resumes
        else "begins again: nothing half-written is left"
    )
    _exit(f"{Stopped(number)}; the same command {after}", status=128 + number)


def _mistake_behind(error: BaseException | None) -> UserError | None:
    """What a resolver of ours has refused, behind Hydra's own words for it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def explained(error: Exception) -> str:
    """Hydra's message; where a key is unknown, with the allowed ones and the closest."""
    cause: BaseException = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and isinstance(parent, DictConfig):
        options = sorted(str(k) for k in parent if k not in ("_target_", "hydra", "reads"))
        close = difflib.get_close_matches(str(cause.key), options, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        group = str(key).partition(".")[0]
        if having := choices_with(str(key)):
            names = " and ".join(f"{group}={choice}" for choice in having)
            verb, one = ("have", "one of them") if len(having) > 1 else ("has", "it")
            hint += f" {names} {verb} it; leave it out, or choose {one}."
        allowed = f" Allowed: {', '.join(options)}" if options else ""
        return f"{key} is not a key of this configuration.{hint}{allowed}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{key}: {cause.msg or cause}".splitlines()[0]
    if table := re.search(r"experiment/(?:paper/)?(?:mgd3/)?(table|figure)(\d+)", str(error)):
        kind, number = table.groups()
        return (
            f"experiment={kind}{number} is a {kind} of the paper, many runs; run it as «python "
            f"scripts/reproduce.py {kind}={number}» (plan=true says what it would take)"
        )
    if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return str(checks.unknown(group, name, [o for o in error.options if o != name]))
    if ambiguous := re.search(r"Ambiguous value for argument '(.*?)=(.*)'\n", str(error)):
        key, values = ambiguous.groups()
        return (
            f"{key}={values} is several values: -m runs them all, one after another; a list is "
            f"written {key}=[{values}]"
        )
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} is unreadable: a value with one of = , [ ] {{ }} ( ) ' : # or space "
            "is written in two kinds of quotes, such as 'dataset.root=\"/photos, 2024\"'"
        )
    lines = str(error).split("Config search path")[0].split("\n")
    return " ".join(line.strip() for line in lines if line.strip())


def _raised_by_hydra(error: OSError) -> bool:
    """Did Hydra fail to make the run's folder, rather than one of our own files?"""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    known = [f for f in files if "site-packages" in f or f.startswith(str(ROOT))]
    return f"{os.sep}hydra{os.sep}" in known[-1].removeprefix(str(ROOT))


def _exit(message: str, status: int = 1) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(status)

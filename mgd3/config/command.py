"""The command line: one dialect for every script, and errors that people can act on."""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from mgd3.config.identity import register, spelt
from mgd3.config.schema import CONFIGS, ROOT
from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.runtime.stopping import Stopped, received
from mgd3.runtime.text import one_line
from mgd3.storage.files import REFUSALS

_MOVED: dict[str, str | None] = {  # keys of earlier versions, and what stands for them
    **{
        key: f"compute.{key}"
        for key in (
            "device", "precision", "compile", "channels_last", "vae_slicing", "batch_size",
            "workers", "parallel",
        )
    },
    **{
        f"protocol.{key}": f"protocol.optimization.{key}"
        for key in (
            "lr", "lr_by_student", "momentum", "weight_decay", "milestones", "gamma",
            "cosine_periods",
        )
    },
    **{
        f"protocol.{key}": f"protocol.augmentation.{key}"
        for key in ("crop_scale", "crop_ratio", "flip", "jitter", "lighting", "cutmix", "patches")
    },
    "protocol.batch_size": "protocol.optimization.batch_size",
    "protocol.labels": "protocol.answers.source",
    "protocol.label_seed": "protocol.answers.seed",
    "protocol.temperature": "protocol.answers.temperature",
    "protocol.precision": "compute.training_precision",
    "finetune.precision": "compute.training_precision",
    "train.precision": "compute.training_precision",
    "guidance.schedule": None, "guidance.adapt": None, "guidance.repulsion": None,
}  # fmt: skip


_STAYED = ""
OF_DATASET = "dataset."  # keys of whichever dataset it is


# Options that scripts had before they spoke Hydra's dialect.
_OLD_OPTIONS = (
    "picture", "plot", "by", "markdown", "best", "plan", "rehearsal", "only", "out", "steps",
    "latents", "num_modes", "epochs", "no_real", "vae", "image_size", "least", "sha256",
)  # fmt: skip


def command(
    main: Callable[[], None],
    positional: str | None = None,
    resumes: bool = True,
    of_paper: bool = False,
) -> None:
    """Run a script's Hydra main; `positional` is the key that a bare word most likely means.

    `resumes` says whether the same command goes on where a signal has stopped it; `of_paper`,
    whether datasets are those of a paper's table rather than the one that Hydra composes with.
    """
    register()
    logging.raiseExceptions = False  # a full disk loses a line of the log, not the screen
    with errors_for_people(resumes):
        refuse_old_words(sys.argv[1:], positional)
        if _sweeps(sys.argv[1:]):
            sys.argv[1:] = [_for_each_run(argument) for argument in sys.argv[1:]]
        if of_paper:
            sys.argv[1:] = [_as_text(_unchecked(argument)) for argument in sys.argv[1:]]
        main()


def _sweeps(arguments: Sequence[str]) -> bool:
    """Is this a sweep, by option or by its experiment?"""
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        return True
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    file = Path(CONFIGS, "experiment", f"{given.get('experiment')}.yaml")
    return file.is_file() and "MULTIRUN" in file.read_text()


def _for_each_run(argument: str) -> str:
    """One value of a group's key as a sweep over it alone.

    Hydra then composes each run with it, but not the sweep's own configuration, whose method may
    have no such key.
    """
    of_group = re.fullmatch(r"([a-z]+)\.[^=]+=(?!.*\(|.*,(?![^\[{]*[\]}]))(.+)", argument)
    if not of_group or of_group[1] == "hydra" or not Path(CONFIGS, of_group[1]).is_dir():
        return argument
    key, _, value = argument.partition("=")
    return f"{key}=choice({value})"


def _unchecked(argument: str) -> str:
    """A key of the dataset as one that Hydra adds: the table's dataset has it, digits may not."""
    return f"++{argument}" if argument.startswith(OF_DATASET) else argument


def _as_text(argument: str) -> str:
    """The name of a cell in quotes, for its commas, pluses and brackets mean nothing to Hydra."""
    key, is_pair, value = argument.partition("=")
    text = key == "explain" and is_pair and value != "null" and not value.startswith(('"', "'"))
    return f"{key}={spelt(value)}" if text else argument


def refuse_old_words(arguments: Sequence[str], positional: str | None = None) -> None:
    """`UserError` for what Hydra's dialect does not know: bare words, options, keys that moved."""
    follows = False
    for argument in arguments:
        if argument.startswith("-"):
            follows = argument in ("--config-dir", "-cd", "--config-name", "-cn", "-cp", "-p", "-c")
            follows |= argument in ("--cfg", "--info", "-i", "--package", "--config-path")
            word = argument.lstrip("-").partition("=")[0].replace("-", "_")
            if word in _OLD_OPTIONS:
                raise UserError(f"{argument} is no option any more: write {word}=VALUE")
            continue
        key, is_pair, value = argument.lstrip("+~").partition("=")
        if is_pair and not value and not argument.startswith("~"):
            raise UserError(
                f"{argument} has no value (a variable that is not set?); give one, or leave "
                f"{key} out; an empty text is written {key}='\"\"'"
            )
        if not is_pair and not follows and not argument.startswith("~"):
            hint = f"; write {positional}={argument}" if positional else ""
            raise UserError(f"{argument!r} is not KEY=VALUE{hint}")
        follows = False
        if value == "null" and key != "experiment" and (Path(CONFIGS) / key).is_dir():
            names = sorted(path.stem for path in (Path(CONFIGS) / key).glob("*.yaml"))
            raise UserError(f"{argument}: this needs a name; allowed: {', '.join(names)}")
        now = _moved(key)
        if now != _STAYED:
            raise UserError(
                f"{key} is now {now}: write {now}={value}"
                if now
                else f"{key} is gone: no table and no result used it"
            )
        elsewhere = any(a.startswith(("guidance=", "experiment=")) for a in arguments)
        if key == "guidance.tangent_dim" and not elsewhere:
            raise UserError(f"{key} belongs to guidance=mode_tangent: add that")
        if key == "paper":
            name = value.rpartition("/")[2]
            kind, number = name.rstrip("0123456789"), name.lstrip("abcdefghijklmnopqrstuvwxyz")
            raise UserError(f"paper tables run as «python scripts/reproduce.py {kind}={number}»")
        if key == "only" and "=" in value:
            raise UserError(f"{argument} is now only.{value}")


def _moved(key: str) -> str | None:
    """The new name of a key, None for one that is gone, `_STAYED` for all others."""
    for recipe in ("protocol.teacher.recipe.", "features.recipe.", "metrics.recipe."):
        if key.startswith(recipe):
            now = _MOVED.get(f"protocol.{key.removeprefix(recipe)}", _STAYED)
            return f"{recipe}{now.removeprefix('protocol.')}" if now else now
    return _MOVED.get(key, _STAYED)


@contextmanager
def errors_for_people(resumes: bool = True) -> Iterator[None]:
    """Print what a user can mend in one paragraph, exit with 1; a bug shows its traceback."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # or Hydra swallows the exception's type
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except CorruptFileError as error:
        _exit(f"{error}; delete it and run the same command to make it again")
    except (HydraException, OmegaConfBaseException) as error:
        _exit(str(_mistake_behind(error) or explained(error)))
    except OSError as error:
        if not (error.errno in REFUSALS or _raised_by_hydra(error)):
            raise
        reason = REFUSALS.get(error.errno or 0, f"{error.strerror}; choose another hydra.run.dir")
        _exit(f"{error.filename or 'a file of this run'}: {reason}")
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        operation = str(error).split(" does not have")[0]
        _exit(
            f"compute.deterministic=true: {operation} has no deterministic form on this device; "
            "take compute.device=cpu or another student, or leave compute.deterministic=false"
        )
    except KeyboardInterrupt as error:
        _end(error.signal if isinstance(error, Stopped) else signal.SIGINT, resumes)
    except Exception:
        if not received():  # else what a process leaves behind that others waited for
            raise
        _end(received(), resumes)


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
        options = sorted(str(k) for k in parent if k not in ("_target_", "hydra"))
        close = difflib.get_close_matches(str(cause.key), options, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        allowed = (
            ", ".join(options) or f"nothing: {str(key).rpartition('.')[0]} has no options here"
        )
        return f"{key} is not a key of this configuration.{hint} Allowed: {allowed}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{key}: {cause.msg or cause}".splitlines()[0]
    if table := re.search(r"experiment/(?:paper/)?(?:mgd3/)?(table|figure)(\d+)", str(error)):
        kind, number = table.groups()
        return (
            f"experiment={kind}{number} is a {kind} of the paper, many runs; run it as «python "
            f"scripts/reproduce.py {kind}={number}» (plan=true says what it would take)"
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

"""What was typed, before Hydra reads it: what a shell has split or left alone is put right.

What cannot be meant is refused with what to type instead.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from mgd3.config.identity import spelt
from mgd3.config.schema import CONFIGS
from mgd3.config.scripts import Script
from mgd3.runtime.errors import UserError

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


# Hydra's options that take a value
_WITH_VALUE = (
    "--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p",
    "--cfg", "-c", "--info", "-i", "--experimental-rerun",
)  # fmt: skip


def understood(arguments: Sequence[str], script: Script) -> list[str]:
    """The arguments as Hydra takes them; `UserError` for what a script does not read."""
    options, words = _parted(arguments)
    words = [_as_text(word) for word in words] if script.of_paper else words
    overrides = [_at_home(word) for word in _pairs(_joined(words), script)]
    refuse_old_words(overrides)
    looks = any(option.split("=")[0] in _LOOKING for option in options)
    if not any(option in ("--config-name", "-cn") for option in options):
        script.refuse_unread(overrides, looks)
    if not looks and _sweeps(options, overrides):
        overrides = [_for_each_run(override) for override in overrides]
    if script.of_paper:
        overrides = [_unchecked(override) for override in overrides]
    return [*options, *overrides]


_LOOKING = (  # nothing is run
    "--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help", "--version",
)  # fmt: skip


def _parted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options with their values, and all else."""
    options, words, follows = [], [], False
    for argument in arguments:
        if follows or argument.startswith("-"):
            word = argument.lstrip("-").partition("=")[0].replace("-", "_")
            if not follows and word in _OLD_OPTIONS:
                raise UserError(f"{argument} is no option any more: write {word}=VALUE")
            options.append(argument)
            follows = argument in _WITH_VALUE and not follows
        else:
            words.append(argument)
    return options, words


def _joined(words: Sequence[str]) -> list[str]:
    """Words with those together that a shell has cut a list into, as in «ipc=10, 20»."""
    found: list[str] = []
    for word in words:
        before = found[-1] if found else ""
        is_pair = _PAIR.match(word) is not None
        goes_on = _is_open(before) or (before.endswith(",") and not is_pair)
        if goes_on or (found and word.startswith(",")):
            found[-1] = f"{before} {word}"
        elif found and (word == "=" or before.endswith(" =")):
            found[-1] = f"{before} =" if word == "=" else f"{before.removesuffix(' =')}={word}"
        else:
            found.append(word)
    for text in found:
        if _is_open(text):
            raise UserError(f"{text}: a bracket is not closed; a list is written KEY=[A,B]")
        if text.endswith(","):
            key = text.partition("=")[0]
            raise UserError(f"{text} ends with a comma: write {key}=A,B for a sweep (with -m)")
    return found


_PAIR = re.compile(r"[+~]*[\w./@:]+=")
_QUOTED = re.compile(r"""(["'])(?:\\.|(?!\1).)*\1""")


def _is_open(text: str) -> bool:
    """Has a value brackets that are not closed?"""
    bare = _QUOTED.sub("", text)
    return sum(map(bare.count, "[{(")) > sum(map(bare.count, "]})"))


def _pairs(words: Sequence[str], script: Script) -> list[str]:
    """Words as KEY=VALUE; a bare one is the value of the script's own key, unless that is given."""
    pairs = [word for word in words if "=" in word or word.startswith("~")]
    bare = [word for word in words if word not in pairs]
    keys = {script.key_of(word) for word in bare} - {None}
    for word in bare[:1]:
        given = any(pair.split("=")[0] in keys for pair in pairs)
        if not keys or given or len(keys) > 1 or (len(bare) > 1 and not script.several):
            raise UserError(f"{word!r} is not KEY=VALUE{_hint(word, words, script)}")
    if not bare:
        return pairs
    (key,) = keys
    values = ",".join(map(spelt, bare))
    return [f"{key}=[{values}]" if len(bare) > 1 else f"{key}={values}", *pairs]


def _hint(word: str, words: Sequence[str], script: Script) -> str:
    """What may be meant by a bare word."""
    table = re.fullmatch(r"(table|figure)(\d+)", word)
    if table and "table" in script.known:
        return f"; write {table[1]}={table[2]}"
    groups = [g for g in script.known if Path(CONFIGS, g, f"{word}.yaml").is_file()]
    if groups:
        return f"; write {groups[0]}={word}"
    before = words[words.index(word) - 1] if words.index(word) else ""
    if "=" in before:
        key, _, value = before.partition("=")
        return (
            f"; a value with a space is written in two kinds of quotes: '{key}=\"{value} {word}\"'"
        )
    return "; --help lists the keys"


def _at_home(override: str) -> str:
    """An override with `~` as a shell expands it where a word begins."""
    key, is_pair, value = override.partition("=")
    if not is_pair or "~" not in value:
        return override
    expanded = _HOME.sub(lambda match: spelt(os.path.expanduser(match[0])), value)
    return f"{key}={expanded}"


_HOME = re.compile(r"(?:^|(?<=[\[,])|(?<=, ))~[^,\[\]{}()'\" ]*")


def refuse_old_words(overrides: Sequence[str]) -> None:
    """`UserError` for keys that moved, and for values that no key takes."""
    for override in overrides:
        key, is_pair, value = override.lstrip("+~").partition("=")
        if override.startswith("~"):
            continue
        if is_pair and not value:
            raise UserError(
                f"{override} has no value (a variable that is not set?); give one, or leave "
                f"{key} out; an empty text is written {key}='\"\"'"
            )
        if value == "null" and key != "experiment" and (Path(CONFIGS) / key).is_dir():
            names = sorted(path.stem for path in (Path(CONFIGS) / key).glob("*.yaml"))
            raise UserError(f"{override}: this needs a name; allowed: {', '.join(names)}")
        now = _moved(key)
        if now != _STAYED:
            raise UserError(
                f"{key} is now {now}: write {now}={value}"
                if now
                else f"{key} is gone: no table and no result used it"
            )
        if key == "paper":
            name = value.rpartition("/")[2]
            kind, number = name.rstrip("0123456789"), name.lstrip("abcdefghijklmnopqrstuvwxyz")
            raise UserError(f"paper tables run as «python scripts/reproduce.py {kind}={number}»")
        if key == "only" and "=" in value:
            raise UserError(f"{override} is now only.{value}")


def _moved(key: str) -> str | None:
    """The new name of a key, None for one that is gone, `_STAYED` for all others."""
    for recipe in (
        "protocol.teacher.recipe.",
        "features.recipe.",
        "surrogate.recipe.",
        "metrics.recipe.",
    ):
        if key.startswith(recipe):
            now = _MOVED.get(f"protocol.{key.removeprefix(recipe)}", _STAYED)
            return f"{recipe}{now.removeprefix('protocol.')}" if now else now
    return _MOVED.get(key, _STAYED)


def _sweeps(options: Sequence[str], overrides: Sequence[str]) -> bool:
    """Is this a sweep, by option or by its experiment?"""
    if {"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*options, *overrides}:
        return True
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    file = Path(CONFIGS, "experiment", f"{given.get('experiment')}.yaml")
    return file.is_file() and "MULTIRUN" in file.read_text()


def _for_each_run(override: str) -> str:
    """One value of a group's key as a sweep over it alone.

    Hydra then composes each run with it, but not the sweep's own configuration, whose method may
    have no such key.
    """
    of_group = re.fullmatch(r"([a-z]+)\.[^=]+=(?!.*\(|.*,(?![^\[{]*[\]}]))(.+)", override)
    if not of_group or of_group[1] == "hydra" or not Path(CONFIGS, of_group[1]).is_dir():
        return override
    key, _, value = override.partition("=")
    return f"{key}=choice({value})"


def _as_text(override: str) -> str:
    """The name of a cell in quotes, for its commas, pluses and brackets mean nothing to Hydra."""
    key, is_pair, value = override.partition("=")
    text = key == "explain" and is_pair and value != "null" and not value.startswith(('"', "'"))
    return f"{key}={spelt(value)}" if text else override


def _unchecked(override: str) -> str:
    """A key of the dataset as one that Hydra adds: the table's dataset has it, digits may not."""
    return f"++{override}" if override.startswith(OF_DATASET) else override

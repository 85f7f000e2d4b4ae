"""What each script reads and says of itself: its file below configs/ is all there is to know.

A file's head says what the script does, an example of its command, and what it writes; a root key's
comment explains the key. Neither Hydra's composition nor torch is needed for help or a refusal.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mgd3.config.schema import CONFIGS
from mgd3.runtime.errors import UserError

_RUN = "config"  # configs/config.yaml is run.py's
_LINE = re.compile(r"\s*(\w+):\s*(.*?)(?:\s+#\s*(.*))?")  # of a root key: name, value, comment


@dataclass(frozen=True, kw_only=True)
class Key:
    """A root key, or a group."""

    name: str
    default: str
    says: str
    is_group: bool = False

    @property
    def needed(self) -> bool:
        """Has it no value of its own?"""
        return self.default == "???"


@dataclass(frozen=True, kw_only=True)
class Script:
    """A command, and what may be said to it."""

    name: str  # of its file below configs/
    positional: str | None = None  # the key that a bare word means
    with_slash: str | None = None  # the key that one with a slash means, if another
    several: bool = False  # may there be several of them?
    one_of: tuple[str, ...] = ()  # keys of which one must be given
    refuses: tuple[str, ...] = ()  # of its configuration: not for people, or not read
    resumes: bool = True  # does the same command go on where a signal has stopped it?
    of_paper: bool = False  # are datasets those of a paper's table, whatever Hydra composes with?

    @property
    def file(self) -> str:
        """As it is typed, from the project's folder."""
        return "run.py" if self.name == _RUN else f"scripts/{self.name}.py"

    @cached_property
    def head(self) -> list[str]:
        """The lines that say what it does."""
        lines = _text(self.name).splitlines()
        stop = next(i for i, line in enumerate(lines) if not line.startswith("#"))
        return [line.removeprefix("#").removeprefix(" ") for line in lines[:stop]]

    @property
    def example(self) -> str:
        """The first command of the head."""
        found = re.search(rf"python {re.escape(self.file)}[^\n]*", "\n".join(self.head))
        return re.split(r"\s{3,}|\s+\\$", found[0])[0] if found else f"python {self.file}"

    @cached_property
    def own(self) -> dict[str, Key]:
        """Its keys and groups, without those of run.py that it hands on."""
        bases = [base for base in _bases(self.name) if base != _RUN]
        files = (*bases, self.name)  # what a file says itself counts
        return {k.name: k for file in files for k in _keys(file) if k.name not in self.refuses}

    @cached_property
    def known(self) -> list[str]:
        """All root keys that it reads."""
        files = (self.name, *_bases(self.name))
        keys = {root_of(key.name) for file in files for key in _keys(file)}
        return sorted(keys - set(self.refuses))

    @property
    def hands_on(self) -> bool:
        """Does it take run.py's keys, too?"""
        return _RUN in _bases(self.name)

    def key_of(self, word: str) -> str | None:
        """The key that a bare word is the value of."""
        return (self.with_slash if "/" in word else None) or self.positional

    def completions(self, word: str) -> list[str]:
        """What a shell may make of the beginning of a root key."""
        keys = [key for key in self.known if key.startswith(word)]
        groups = [key for key in keys if Path(CONFIGS, key).is_dir()]
        return [*(f"{key}=" for key in keys), *(f"{group}." for group in groups)]

    def refuse_unread(self, overrides: Sequence[str], is_shown: bool = False) -> None:
        """`UserError` for a root key that it does not read, and where a key is missing.

        A configuration that `is_shown` alone need not be complete.
        """
        named = {root_of(override) for override in overrides}
        for override in overrides:
            root = root_of(override)
            if root not in (*self.known, "hydra"):
                raise UserError(self._unread(root))
        if not is_shown:
            self._require_needed(named)

    def _require_needed(self, named: Collection[str]) -> None:
        missing = [k.name for k in self.own.values() if k.needed and k.name not in named]
        one_of = [key for key in self.one_of if key in named]
        if missing or (self.one_of and not one_of):
            what = " and ".join(f"{m}=…" for m in missing) or (
                "one of " + ", ".join(f"{k}=…" for k in self.one_of)
            )
            raise UserError(
                f"{self.file} needs {what}, for example «{self.example}»; --help explains its keys"
            )

    def _unread(self, root: str) -> str:
        close = difflib.get_close_matches(root, self.known, n=3)
        others = [s.file for s in SCRIPTS.values() if root in s.known and s.name != self.name]
        if len(others) > _MOST_NAMED:
            others = [f for f in others if f == "run.py"] or others[:_MOST_NAMED]
        said = f"{self.file} reads no key {root}."
        if close:
            said += f" Did you mean {' or '.join(close)}?"
        if others:
            said += f" {' and '.join(others)} read{'s' if len(others) == 1 else ''} it."
        return f"{said} Allowed here: {', '.join(self.known)}; --help explains them"

    def help(self) -> str:
        """What `--help` prints: the same form for every script."""
        keys = [k for k in self.own.values() if not k.is_group]
        groups = [k for k in self.own.values() if k.is_group]
        lines = [*self.head, ""]
        if keys:
            lines += ["Keys (KEY=VALUE; after = what holds unless told otherwise)", *_table(keys)]
        if groups:
            lines += ["Groups (GROUP=NAME; keys of the chosen one as GROUP.KEY=VALUE)"]
            lines += [*_table(groups)]
        if self.hands_on:
            names = [k for k in SCRIPTS["run"].known if k not in self.own]
            lines += [f"And the keys of run.py, which the runs get: {', '.join(names)}"]
        if self.positional:
            lines += [f"A bare word is the value of {self.positional}."]
        return "\n".join([*lines, _ENDING])


_MOST_NAMED = 3
_ENDING = (
    "--cfg job prints the whole configuration with its values, --info defaults which file each "
    "choice\ncomes from, --hydra-help what else Hydra offers. docs/command_line.md says more."
)


def _table(keys: Sequence[Key]) -> list[str]:
    """A line each: what is typed, then what it means."""
    typed = [k.name if k.is_group else f"{k.name}={k.default}" for k in keys]
    width = min(max(map(len, typed)), 30)
    lines = []
    for key, text in zip(keys, typed, strict=True):
        says = f"needed: {key.says}" if key.needed else key.says
        lines.append(f"  {text.removesuffix('???'):{width}}  {says}".rstrip())
    return [*lines, ""]


def root_of(argument: str) -> str:
    """The root key that an argument sets, adds or removes."""
    return re.split(r"[=.@/:]", argument.lstrip("+~"), maxsplit=1)[0]


def _keys(name: str) -> list[Key]:
    """Root keys and groups of one file below configs/, in its order."""
    found, above = [], ""
    for line in _text(name).splitlines():
        match = _LINE.fullmatch(line)
        if not match:
            continue
        above = "" if not line.startswith(" ") else above
        if match[1] in ("defaults", "hydra"):
            above = match[1]
        elif not match[2]:
            above = f"{match[1]}."
        elif above in ("", "train."):
            found.append(Key(name=f"{above}{match[1]}", default=match[2], says=match[3] or ""))
    groups = [entry for entry in _defaults(name) if isinstance(entry, dict)]
    return found + [_group(*pair) for entry in groups for pair in entry.items()]


def _group(key: str, choice: str | None) -> Key:
    there = ", ".join(sorted(path.stem for path in Path(CONFIGS, key).glob("*.yaml")))
    looked_up = str(choice).startswith("${")
    says = f"[{'as fits the dataset' if looked_up else choice or 'none'}] {there}"
    return Key(name=key, default=str(choice), says=says, is_group=True)


def _bases(name: str) -> list[str]:
    """The files that a file is made of, theirs included."""
    found: list[str] = []
    for entry in _defaults(name):
        if isinstance(entry, str) and entry != "_self_":
            found += [entry, *_bases(entry)]
    return found


def _defaults(name: str) -> list[Any]:
    """A file's defaults list, but for what it overrides in Hydra's own groups."""
    node: Any = OmegaConf.load(Path(CONFIGS, f"{name}.yaml"))
    found: Any = OmegaConf.to_container(node.defaults)
    ours = [e for e in found if isinstance(e, str) or "hydra/" not in str(*e)]
    return [e if isinstance(e, str) else _plain(e) for e in ours]


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    """A group's choice, whether it is the first or takes another's place."""
    return {group.removeprefix("override "): choice for group, choice in entry.items()}


@cache
def _text(name: str) -> str:
    return Path(CONFIGS, f"{name}.yaml").read_text()


_SCRIPTS = (
    Script(name=_RUN, refuses=("folder",)),
    Script(
        name="reproduce",
        one_of=("table", "figure", "grid"),
        refuses=("folder", "paper", "paper_table"),
        of_paper=True,
    ),
    Script(
        name="make_tables",
        one_of=("table", "figure", "grid"),
        refuses=("folder", "paper", "paper_table", "plan"),
        resumes=False,
        of_paper=True,
    ),
    Script(name="evaluate", positional="images"),
    Script(name="measure", positional="images", resumes=False),
    Script(
        name="map_guidance",
        positional="images",
        refuses=("redundancy", "class_maps", "most_real", "unseen", "students"),
        resumes=False,
    ),
    Script(name="image_shifts", positional="images", resumes=False),
    Script(name="report", positional="folder", resumes=False),
    Script(name="compare", positional="folders", several=True, resumes=False),
    Script(name="show_modes", positional="sets", several=True, resumes=False),
    Script(name="remake_image", positional="set", resumes=False),
    Script(name="publish", positional="set"),
    Script(name="fetch_data", positional="name"),
    Script(
        name="fetch_weights",
        positional="backbone",
        with_slash="source",
        one_of=("backbone", "source"),
    ),
    Script(name="train_backbone"),
    Script(name="train_teacher"),
    Script(name="benchmark", positional="what", several=True, resumes=False),
)
SCRIPTS = {Path(script.file).stem: script for script in _SCRIPTS}

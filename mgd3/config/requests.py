"""What scripts/reproduce.py and scripts/make_tables.py are asked for on their command lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mgd3.config.schema import CONFIGS
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Request:
    """One experiment, some of its cells, and how."""

    experiment: str
    only: list[str]
    flags: Mapping[str, bool]  # plan, rehearsal
    overrides: list[str]  # of run.py


def read_request(arguments: Sequence[str], flags: Sequence[str], usage: str) -> Request:
    """`table=1`, `figure=7` or `experiment=NAME`, `only=…` (repeatable), flags, overrides.

    Prints `usage` and ends for --help; raises `UserError` for anything else.
    """
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage)
        sys.exit(0 if arguments else 1)
    names, only, overrides = [], [], []
    given = dict.fromkeys(flags, False)
    for argument in arguments:
        key, is_pair, value = argument.partition("=")
        if not is_pair:
            raise UserError(f"{argument!r} is not KEY=VALUE; --help shows what there is")
        if key in ("table", "figure"):
            names.append(_named(key, value))
        elif key == "experiment":
            names.append(value)
        elif key == "only":
            only.append(value)
        elif key in given:
            given[key] = checks.choice(key, value.lower(), ["true", "false"]) == "true"
        else:
            overrides.append(argument)
    if len(names) != 1:
        raise UserError(f"name one of them: table=1, figure=7; got {len(names)}")
    return Request(experiment=names[0], only=only, flags=given, overrides=overrides)


def paper_experiments() -> list[str]:
    """Names of the experiment files that are tables or figures of the paper, in its order."""
    found = [p.stem for p in Path(CONFIGS, "experiment").glob("*.yaml")]
    matches = [m for name in found if (m := re.fullmatch(r"(table|figure)(\d+)", name))]
    return [m[0] for m in sorted(matches, key=lambda m: (m[1] == "figure", int(m[2])))]


def _named(kind: str, number: str) -> str:
    numbers = [n.removeprefix(kind) for n in paper_experiments() if n.startswith(kind)]
    return kind + checks.choice(kind, number, numbers)

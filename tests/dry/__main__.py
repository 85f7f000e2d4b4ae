"""The table: PYTHONPATH=tests python -m dry [part of a subject's name ...] [json=FILE]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dry.measured import Figures, measured
from dry.subjects import subjects

_HEAD = (
    f"{'subject':44} {'waits':>6} {'copies':>6} {'bytes to device':>15} {'to host':>8} "
    f"{'pixels':>7} difference"
)


def main(words: list[str]) -> None:
    files = [word.removeprefix("json=") for word in words if word.startswith("json=")]
    words = [word for word in words if not word.startswith("json=")]
    chosen = [s for s in subjects() if not words or any(word in s.name for word in words)]
    print(_HEAD)
    found = []
    for figures in measured(chosen):
        found.append(_plain(figures))
        print(_line(figures), flush=True)
    for file in files:
        Path(file).write_text(json.dumps(found))


def _line(f: Figures) -> str:
    """What a subject's step costs, and the lines that it costs it at."""
    counted = f.waits, f.copies, f.to_device, f.to_host
    waits, copies, to_device, to_host = (sum(each.values()) for each in counted)
    head = (
        f"{f.name:44} {waits:6.1f} {copies:6.1f} {to_device:15.0f} {to_host:8.0f} "
        f"{f.pixels:7d} {f.difference:10.3g}  per {f.step}; {f.seconds:.1f} s"
    )
    lines = [f"    {n:6.1f} {what:28} {where}" for (what, where), n in f.waits.most_common()]
    lines += [f"    expanded and copied, {n} bytes: {where}" for where, n in f.expanded.items()]
    return "\n".join([head, *([f.refused] if f.refused else []), *lines])


def _plain(f: Figures) -> dict[str, object]:
    """For a file, whose keys are words."""
    pairs = ("waits", "copies")
    return vars(f) | {name: [[*key, n] for key, n in vars(f)[name].items()] for name in pairs}


if __name__ == "__main__":
    main(sys.argv[1:])

"""The table: PYTHONPATH=tests python -m dry [part of a subject's name ...] [json=FILE]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dry.measured import Figures, measured
from dry.subjects import subjects


def main(words: list[str]) -> None:
    files = [word.removeprefix("json=") for word in words if word.startswith("json=")]
    words = [word for word in words if not word.startswith("json=")]
    chosen = [s for s in subjects() if not words or any(word in s.name for word in words)]
    print(f"{'subject':41} {'waits':>6} {'to device':>10} {'to host':>8} {'pixels':>7}  difference")
    found = []
    for figures in measured(chosen):
        found.append(_plain(figures))
        print(_line(figures), flush=True)
    for file in files:
        Path(file).write_text(json.dumps(found))


def _line(f: Figures) -> str:
    """What a subject's step costs, and the lines that it costs it at."""
    waits, to_device, to_host = (sum(c.values()) for c in (f.waits, f.to_device, f.to_host))
    head = (
        f"{f.name:41} {waits:6.2f} {to_device:10.0f} {to_host:8.0f} {f.pixels:7d}"
        f"  {f.difference:10.3g}  per {f.step}; {f.seconds:.1f} s"
    )
    lines = [f"    {n:6.2f} {what:28} {where}" for (what, where), n in f.waits.most_common()]
    lines += [f"    expanded and copied, {n} bytes: {where}" for where, n in f.expanded.items()]
    return "\n".join([head, *([f.refused] if f.refused else []), *lines])


def _plain(f: Figures) -> dict[str, object]:
    """For a file."""
    return vars(f) | {"waits": [[*key, n] for key, n in f.waits.items()]}


if __name__ == "__main__":
    main(sys.argv[1:])

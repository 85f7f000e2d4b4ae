"""Text is data: names, titles and messages as one printable line, and as a line of Markdown."""

from __future__ import annotations

import logging
import re
from pathlib import Path

# Of marks that mean something between words alone, only those: «0.0*» and hard_label stay legible.
_MARKDOWN_MARKS = re.compile(r"[\\`|~<]|\*(?=\S)|(?<![^\W_])_|_(?![^\W_])|(?<=\])\(|&(?=#?\w+;)")
# C0 and C1 controls, line and paragraph separators, and what turns the direction of a line around
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]+"
)


class PrintableFormatter(logging.Formatter):
    """Log lines without what a terminal would obey; a traceback keeps its line breaks."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or the lines of a traceback."""
        lines = super().format(record).split("\n")
        return "\n".join(_UNPRINTABLE.sub(" ", line) for line in lines)


class RunLog(logging.FileHandler):
    """A run's log; a run that was refused has no folder any more, and its error no file."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the line where there is a place for it."""
        if self.stream is not None or Path(self.baseFilename).parent.is_dir():
            super().emit(record)


def is_printable(text: str) -> bool:
    """Is the text free of control characters and line breaks?"""
    return _UNPRINTABLE.search(text) is None


def one_line(text: str) -> str:
    """Text without line breaks and without what a terminal would obey."""
    return _UNPRINTABLE.sub(" ", text)


def markdown_text(text: str) -> str:
    """Text as one line of Markdown, its marks escaped."""
    return _MARKDOWN_MARKS.sub(r"\\\g<0>", one_line(text))


def shortened(text: str, most: int, at_end: bool = False) -> str:
    """Text of at most `most` characters, its middle (or its end) left out where it is longer."""
    if len(text) <= most:
        return text
    behind = 0 if at_end else (most - 1) // 2
    return f"{text[: max(0, most - 1 - behind)]}…{text[len(text) - behind :]}"

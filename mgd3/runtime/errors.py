"""What a user can mend, what this project can make again, and the rule that tells them from bugs.

A user's mistake is whatever goes wrong in a value that was typed, in a file that its reader can
replace (`reading` below), or in what the machine grants (`files.writing`). Everything else is a
bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something its reader can mend: a wrong value, a missing file, a full disk.

    The message names the key or path, the value, what is allowed and what to do next;
    `run.py` prints it without a traceback.
    """


class CorruptFileError(Exception):
    """A file of ours that is truncated or altered; its maker can make it again."""


@contextmanager
def reading(
    path: Path, remedy: str, kind: type[UserError] | type[CorruptFileError] = UserError
) -> Iterator[None]:
    """What goes wrong while a replaceable file is read is the file's fault, whatever was raised.

    A missing file stays a `FileNotFoundError`; the rest becomes `kind`, with the path and `remedy`.
    """
    try:
        yield
    except (UserError, CorruptFileError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # a reader raises anything for content that it does not expect
        raise kind(f"{path} cannot be read ({first_line(error)}); {remedy}") from error


def first_line(error: BaseException) -> str:
    """An error's message in one line, short enough to read."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError) and error.args:
        return f"it has no {error.args[0]!r}"
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} …"


_LONGEST = 200

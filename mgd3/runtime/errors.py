"""What a user can mend, and what this project can make again."""

from __future__ import annotations


class UserError(ValueError):
    """Something its reader can mend: a wrong value, a missing file, a full disk.

    The message names the key or path, the value, what is allowed and what to do next;
    `run.py` prints it without a traceback.
    """


class CorruptFileError(Exception):
    """A file of ours that is truncated or altered; its maker can make it again."""

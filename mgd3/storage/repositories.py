"""Talking to the Hugging Face hub: what goes wrong is one line, and no token is in it."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlparse

from mgd3.runtime.errors import UserError, first_line
from mgd3.storage.digests import sha256_of

HUB = "hf://"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository, as the hub publishes it."""

    name: str
    size: int
    sha256: str | None = None  # of large files only
    git_id: str | None = None  # of the others: the SHA-1 of git's blob

    def is_whole(self, path: Path) -> bool:
        """Has the file at `path` the size and the digest that the hub publishes?"""
        if self.size and path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return sha256_of(path) == self.sha256
        if self.git_id is None:
            return True
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.git_id


def published_files(siblings: Sequence[Any] | None) -> list[HubFile]:
    """The files that the hub's answer about a repository lists.

    Raises `UserError` for a name that would lead out of the folder that they are put in.
    """
    for sibling in siblings or []:
        path = PurePosixPath(sibling.rfilename)
        if path.is_absolute() or ".." in path.parts:
            raise UserError(
                f"the hub lists the file {sibling.rfilename!r}, which would lie outside its "
                "repository's folder: nothing is fetched"
            )
    return [
        HubFile(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
        for s in siblings or []
    ]


def hub_reachable() -> bool:
    """Spares a machine without a network the hub client's half minute of retries."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(v) for v in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    from huggingface_hub.constants import ENDPOINT

    try:
        address = urlparse(ENDPOINT)
        socket.getaddrinfo(address.hostname, address.port or 443)
    except (OSError, ValueError):  # no such host, or nothing that could be one
        return False
    return True


def require_repository(key: str, repository: str) -> None:
    """`UserError` for what is no USER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        well_named = repository.count("/") == 1
    except HFValidationError:
        well_named = False
    if not well_named:
        raise UserError(
            f"{key}={repository!r} is no repository of the hub; allowed: USER/NAME, of letters, "
            "digits, «-», «_» and «.»"
        )


@contextmanager
def talking(failure: str, after: str = "") -> Iterator[None]:
    """What goes wrong between here and the hub, as one line without the token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    for chatty in ("httpx", "httpx2", "urllib3"):  # a line for every request
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled as error:
        raise UserError(f"{failure}: HF_HUB_OFFLINE is set; unset it{after}") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{failure}: the hub has no such revision{after}") from error
    except GatedRepoError as error:
        raise UserError(
            f"{failure}: its owner wants terms accepted first: do that on its page on the hub, "
            f"with the account of HF_TOKEN or of «hf auth login»{after}"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{failure}: the hub has no such repository, or not for this account (HF_TOKEN, «hf "
            f"auth login»){after}"
        ) from error
    except Exception as error:  # the client's HTTP library, and its errors, changed over versions
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise UserError(
                f"{failure}: the hub refuses this account; check the name, and that its token may "
                f"do this (HF_TOKEN, «hf auth login»){after}"
            ) from error
        reason = _without(get_token(), first_line(error))
        raise UserError(f"{failure} ({reason}); try the same command again later{after}") from error


def _without(token: str | None, text: str) -> str:
    """Text without the token, as it is or as Python shows it."""
    for shown in (token, repr(token)[1:-1]) if token else ():
        text = text.replace(shown, "…")
    return text

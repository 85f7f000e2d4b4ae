"""Experiment trackers; the only file that knows Weights & Biases."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

log = logging.getLogger(__name__)

CONNECT_SECONDS = 30.0  # without an answer the record stays on disk


class Run(Protocol):
    """One run's record; `with tracker.start(...) as run` ends it."""

    def __enter__(self) -> Run: ...

    def __exit__(self, *error: object) -> None: ...

    def log(self, values: Mapping[str, Any]) -> None:
        """Scalars of one moment."""

    def log_images(self, key: str, images: Sequence[tuple[bytes, str]]) -> None:
        """PNG bytes with captions."""

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table."""


class NoTracker:
    """Records nothing."""

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None: ...

    def start(self, run_id: str, group: str, config: Mapping[str, Any], folder: Path) -> Run:
        """A record of nothing."""
        return self

    def log(self, values: Mapping[str, Any]) -> None:
        """Nothing."""

    def log_images(self, key: str, images: Sequence[tuple[bytes, str]]) -> None:
        """Nothing."""

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Nothing."""


class WandbTracker:
    """Weights & Biases; without an account it records offline, and it never asks."""

    def __init__(self, project: str, mode: str) -> None:
        self.project = project
        self.mode = checks.choice("tracker.mode", mode, ["auto", "online", "offline"])

    def start(self, run_id: str, group: str, config: Mapping[str, Any], folder: Path) -> Run:
        """Begin or resume the record of `run_id`, kept in `folder`/wandb."""
        import wandb

        mode: Any = self.mode
        if mode == "auto":
            mode = os.environ.get("WANDB_MODE") or ("online" if _has_account() else "offline")
        if mode == "online" and not _has_account():
            raise UserError(
                "tracker.mode=online needs an account: set WANDB_API_KEY or run «wandb login», or "
                "choose tracker.mode=offline or tracker=none"
            )
        settings = wandb.Settings(silent=True, init_timeout=CONNECT_SECONDS, console="off")
        options = {
            "project": self.project,
            "id": run_id,
            "group": group,
            "config": dict(config),
            "dir": str(folder),
            "settings": settings,
        }
        try:
            run = wandb.init(mode=mode, resume="allow" if mode == "online" else None, **options)
        except wandb.errors.Error as error:  # a record on disk is better than none
            log.warning("Weights & Biases: %s; recording offline in %s/wandb", error, folder)
            wandb.teardown()  # or the run's id stays taken by the attempt
            run = wandb.init(mode="offline", **options)
        return _WandbRun(run)


class _WandbRun:
    def __init__(self, run: Any) -> None:
        self._run = run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        self._run.finish(exit_code=0 if error[0] is None else 1)

    def log(self, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values))

    def log_images(self, key: str, images: Sequence[tuple[bytes, str]]) -> None:
        import io

        import wandb
        from PIL import Image

        self._run.log(
            {key: [wandb.Image(Image.open(io.BytesIO(data)), caption=c) for data, c in images]}
        )

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self._run.log({key: wandb.Table(columns=list(columns), data=[list(r) for r in rows])})


def _has_account() -> bool:
    """A key in the environment or in the netrc file; wandb itself would ask at the terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc().authenticators(host) is not None
    return False

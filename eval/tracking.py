"""Experiment trackers; the only file that knows Weights & Biases."""

from __future__ import annotations

import logging
import netrc
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from mgd3.runtime import checks
from mgd3.runtime.errors import UserError, first_line
from mgd3.storage.files import local_path

log = logging.getLogger(__name__)

CONNECT_SECONDS = 30.0  # without an answer the record stays on disk
_MODES = ("disabled", "offline", "online")  # by how much leaves the machine
_SHORTEST_KEY = 40
_LONGEST_NAME = 128  # of an artifact
_KEY = re.compile(r"\A[\w.@+]+=")  # of an override
_QUIET: dict[str, Any] = {  # no talk on the screen; nothing of the machine, the code or its place
    "silent": True, "console": "off", "x_disable_meta": True, "x_disable_stats": True,
    "x_disable_machine_info": True, "x_save_requirements": False, "disable_git": True,
    "disable_code": True, "save_code": False,
}  # fmt: skip


class Run(Protocol):
    """One run's record; `with tracker.start(...) as run` ends it."""

    real_images: bool  # may it hold copies of real images?

    def __enter__(self) -> Run: ...

    def __exit__(self, *error: object) -> None: ...

    def log(self, values: Mapping[str, Any]) -> None:
        """Scalars of one moment."""

    def log_images(self, key: str, images: Sequence[tuple[bytes, str]]) -> None:
        """PNG bytes with captions."""

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table."""

    def log_artifact(
        self, name: str, kind: str, files: Mapping[str, Path], metadata: Mapping[str, Any]
    ) -> None:
        """Files that belong together, by their names in the artifact, and where they come from."""


def keep(
    run: Run, name: str, kind: str, files: Mapping[str, Path], metadata: Mapping[str, Any]
) -> None:
    """`run.log_artifact`, if the tracker has it: one of a user's own may be older than that."""
    if hasattr(run, "log_artifact"):
        run.log_artifact(name, kind, files, metadata)


def artifact_name(name: str) -> str:
    """A name as Weights & Biases takes them; the end, which tells names apart, stays."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[-_LONGEST_NAME:]


class NoTracker:
    """Records nothing."""

    real_images = False

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

    def log_artifact(
        self, name: str, kind: str, files: Mapping[str, Path], metadata: Mapping[str, Any]
    ) -> None:
        """Nothing."""


class WandbTracker:
    """Weights & Biases. It records on this disk; nothing leaves the machine unless asked to.

    `mode` «offline» makes no connection at all, «online» uploads. Copies of real images are left
    out of the record unless `real_images`, and so are paths, the command line and the machine.
    """

    def __init__(self, project: str, mode: str = "offline", real_images: bool = False) -> None:
        """Raises `UserError` for a mode or a WANDB_MODE that there is not, or a missing account."""
        self.project = checks.name("tracker.project", project)
        self.real_images = checks.flag("tracker.real_images", real_images)
        asked = checks.choice("tracker.mode", mode, _MODES[1:])
        # the environment may keep a record at home, but not send one away
        allowed = checks.choice("WANDB_MODE", os.environ.get("WANDB_MODE") or asked, _MODES)
        self.mode = min(asked, allowed, key=_MODES.index)
        if self.mode == "online":
            _require_account()

    def start(self, run_id: str, group: str, config: Mapping[str, Any], folder: Path) -> Run:
        """Begin or resume the record of `run_id`, kept in `folder`/wandb.

        `folder` is the one that all runs lie below, apart from every set: what reads a set's folder
        for its images finds no pictures of a record there.
        """
        if self.mode != "online":
            # or its service would send errors and the time of the start to its makers
            os.environ["WANDB_ERROR_REPORTING"] = "false"
        for kind in ("CACHE", "DATA"):  # or they go below the home folder
            os.environ[f"WANDB_{kind}_DIR"] = str(folder / "wandb" / kind.lower())
        os.environ["WANDB_SILENT"] = "true"  # one line of ours says where things go
        import wandb

        options = {
            "project": self.project,
            "id": run_id,
            "group": group,
            "config": _without_places(dict(config)),
            "dir": str(folder.resolve()),  # its service may have begun in another folder
            "settings": wandb.Settings(**_QUIET, init_timeout=CONNECT_SECONDS),
        }
        folder.mkdir(parents=True, exist_ok=True)
        if self.mode != "online":
            _say(folder.resolve(), folder)
            mode: Any = self.mode
            return _WandbRun(wandb.init(mode=mode, **options), self.real_images, folder)
        try:
            run = wandb.init(mode="online", resume="allow", **options)
        except Exception as error:  # of the client, its service or its transport
            log.warning(
                "Weights & Biases: %s; recording offline in %s/wandb", first_line(error), folder
            )
            wandb.teardown()  # or the run's id stays taken by the attempt
            return _WandbRun(wandb.init(mode="offline", **options), self.real_images, folder)
        real = "real images too" if self.real_images else "no real images"
        log.info(
            "Weights & Biases: uploading scores, settings and pictures (%s) to %s", *(real, run.url)
        )
        return _WandbRun(run, self.real_images, folder)


@cache
def _say(place: Path, folder: Path) -> None:
    """Once for all runs of a sweep, whose records lie at one `place`."""
    log.info(
        "Weights & Biases: recording offline in %s/wandb, nothing is uploaded (tracker.mode=online "
        "uploads)",
        folder,
    )


def _say_how_to_upload(folder: Path, run_id: str) -> None:
    """Where a run's record is, and the command that uploads it; one that went on has several."""
    records = sorted((folder / "wandb").glob(f"offline-run-*-{run_id}"))
    joined = "WANDB_RESUME=allow " if len(records) > 1 else ""
    if records:  # none where WANDB_MODE=disabled
        log.info(
            "Weights & Biases: recorded, not uploaded; to upload it: %swandb sync %s "
            "(docs/tracking.md)",
            *(joined, " ".join(shlex.quote(str(path)) for path in records)),
        )


def _without_places(value: Any) -> Any:
    """Settings without the folders of this machine: of a path, also in key=path, its last name."""
    if isinstance(value, Mapping):
        return {key: _without_places(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_places(inner) for inner in value]
    if not isinstance(value, str):
        return value
    path = _KEY.sub("", value)
    if not ("/" in path or path.startswith("~")):
        return value
    is_place = path.startswith(("/", "~", ".")) or local_path(path) is not None
    return value.removesuffix(path) + Path(path).name if is_place else value


class _WandbRun:
    def __init__(self, run: Any, real_images: bool, folder: Path) -> None:
        self._run, self.real_images, self._folder = run, real_images, folder

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error: object) -> None:
        offline, run_id = self._run.offline, self._run.id
        self._run.finish(exit_code=0 if error[0] is None else 1)
        if offline:
            _say_how_to_upload(self._folder, run_id)

    def log(self, values: Mapping[str, Any]) -> None:
        self._run.log(dict(values))

    def log_images(self, key: str, images: Sequence[tuple[bytes, str]]) -> None:
        import io

        import wandb
        from PIL import Image

        opened = [(Image.open(io.BytesIO(data)), caption) for data, caption in images]
        if len({image.size for image, _ in opened}) == 1:
            self._run.log({key: [wandb.Image(image, caption=c) for image, c in opened]})
        else:  # a panel takes pictures of one size alone
            self._run.log({f"{key}/{c}": wandb.Image(image, caption=c) for image, c in opened})

    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        self._run.log({key: wandb.Table(columns=list(columns), data=[list(r) for r in rows])})

    def log_artifact(
        self, name: str, kind: str, files: Mapping[str, Path], metadata: Mapping[str, Any]
    ) -> None:
        import wandb

        known = _without_places(dict(metadata))
        artifact = wandb.Artifact(artifact_name(name), kind, metadata=known)
        for inside, path in files.items():
            # Read where it is once it is uploaded: else the client copies it to the home folder.
            artifact.add_file(os.path.relpath(path), name=inside, policy="immutable")
        self._run.log_artifact(artifact)


def _require_account() -> None:
    """`UserError` without a key in the environment or the netrc file: wandb itself would ask."""
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    key = os.environ.get("WANDB_API_KEY")
    if key is None:
        with suppress(OSError, netrc.NetrcParseError):
            key = (netrc.netrc().authenticators(host) or (None,) * 3)[2]
    if not key:
        raise UserError(
            "tracker.mode=online needs an account: set WANDB_API_KEY or run «wandb login», or "
            "choose tracker.mode=offline or tracker=none"
        )
    if len(key) < _SHORTEST_KEY or not re.fullmatch(r"[\w.-]+", key):
        raise UserError(
            f"the key of Weights & Biases for {host} is none: it has {len(key)} characters, and "
            f"keys have {_SHORTEST_KEY} or more letters and digits; copy it again, or choose "
            "tracker.mode=offline"
        )

"""Distilled sets on the Hugging Face hub: published from here, or fetched to be scored."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mgd3.data.distilled import MANIFEST, DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.storage.repositories import HUB, require_repository, talking

log = logging.getLogger(__name__)

_AT_ONCE = 2000  # images of one commit: the hub refuses commits of too many files
_IMAGES = "images/*.png"  # the hub's pattern, in which a star stands for slashes too
_NOTHING = "nothing was published; make the set again, or correct its manifest"
_NO_ACCOUNT = (
    "publishing needs an account of the Hugging Face hub: run «hf auth login» (huggingface-cli "
    "login), or set HF_TOKEN to a token that may write"
)


def publish(distilled: DistilledDataset, repository: str, card: str, private: bool) -> str:
    """Upload the images that the manifest lists, the manifest and `card`; returns the address.

    Nothing else of the folder leaves the machine. Images of another set that are there are removed.
    Raises `UserError` without an account, for a repository that is public though `private`, and for
    what the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    require_repository("repo", repository)
    _require_plain(distilled)
    token = get_token()
    if not token:
        raise UserError(_NO_ACCOUNT)
    paths = {entry["file"]: distilled.path(entry) for entry in distilled.manifest["images"]}
    with talking(f"{repository} could not be published"):
        api = HfApi(token=token)
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        there = api.dataset_info(repository)
        if private and not there.private:
            raise UserError(
                f"{repository} is public on the hub: private=false publishes the set there, "
                "repo=USER/NAME names another repository"
            )
        files = [file.rfilename for file in there.siblings or []]
        old = [name for name in files if name.startswith("images/") and name not in paths]
        images = [CommitOperationAdd(name, path) for name, path in paths.items()]
        whole: list[Any] = [
            *(CommitOperationDelete(name) for name in old),
            CommitOperationAdd("README.md", card.encode()),
            CommitOperationAdd(MANIFEST, distilled.folder / MANIFEST),
        ]
        batches = [images[i : i + _AT_ONCE] for i in range(0, len(images), _AT_ONCE)]
        for batch in [*batches[:-1], [*batches[-1], *whole]]:  # the manifest comes last
            title = f"{distilled.manifest['dataset']}, {distilled.manifest['method']}"
            api.create_commit(repository, batch, commit_message=title, repo_type="dataset")
    return f"{api.endpoint}/datasets/{repository}"


def local_images(images: str, runs: Path) -> Path:
    """The folder that `images` names; for hf://USER/NAME[@REVISION] a set fetched from the hub.

    It lies in `runs`/hub/USER/NAME/<commit>, real files, so that its scores can lie beside it.
    """
    if not images.startswith(HUB):
        return Path(images)
    named = images.removeprefix(HUB).removeprefix("datasets/")
    repository, _, revision = named.partition("@")
    require_repository("images=hf://USER/NAME[@REVISION], the repository", repository)
    place = runs / "hub" / repository
    earlier = sorted(path.parent for path in place.glob(f"*/{MANIFEST}"))
    known = f"; what came before is here: images={earlier[-1]}" if earlier else ""
    with talking(f"{images} could not be fetched", known):
        return _fetched(repository, revision or None, place)


def _fetched(repository: str, revision: str | None, place: Path) -> Path:
    """The folder below `place` of the commit that a revision is, downloaded unless it is there."""
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().dataset_info(repository, revision=revision)
    commit = info.sha or ""
    if not re.fullmatch("[0-9a-f]{40}", commit):
        raise UserError(f"the hub names no commit of {repository} but {commit!r}; try again later")
    if MANIFEST not in {file.rfilename for file in info.siblings or []}:
        raise UserError(
            f"{repository} on the hub is no distilled dataset of this project: it has no "
            f"{MANIFEST}. Download it yourself and score its images as a folder (docs/data.md)"
        )
    folder = place / commit[:12]
    if DistilledDataset(folder).complete:
        return folder
    log.info("fetching %s of the hub, commit %s, to %s", repository, commit[:12], folder)
    for pattern in (_IMAGES, MANIFEST):  # a folder with a manifest is complete
        snapshot_download(
            repository,
            repo_type="dataset",
            revision=commit,
            local_dir=folder,  # the hub's own cache holds links out of a set, and no scores
            allow_patterns=pattern,
        )
    if not DistilledDataset(folder).complete:
        raise UserError(
            f"{repository} on the hub lacks images that its {MANIFEST} lists: ask its author to "
            "publish it again"
        )
    return folder


def _require_plain(distilled: DistilledDataset) -> None:
    """`UserError` if the manifest names a folder of this machine, or lists what is no image.

    Those of our own sets never do.
    """
    manifest, path = distilled.manifest, distilled.folder / MANIFEST
    for file in (entry["file"] for entry in manifest["images"]):
        if not fnmatchcase(file, _IMAGES):
            raise UserError(
                f"{path} lists {file!r}; only images/<class>/<index>.png is published: {_NOTHING}"
            )
    made = {key: manifest.get(key) for key in ("config", "identity", "data")}
    sources = {e["file"]: e.get("nearest_real") for e in manifest["images"]}
    for key, value in _leaves({**made, "images": sources}):
        if isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()):
            raise UserError(f"{path} names a place on this machine, {key}={value!r}: {_NOTHING}")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, name)
    else:
        yield name, value

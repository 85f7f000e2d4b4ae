"""What a folder was made from, written into it first and compared before anything is reused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

from mgd3.data.inventory import SplitContent, changed_images
from mgd3.runtime.errors import UserError
from mgd3.storage.documents import Count, Sha256, read_document
from mgd3.storage.files import write_json

FORMAT = 2  # folders of earlier versions of the project have none
_WORDS = {"train": "training", "val": "test"}
OF_SET, OF_SCORES = "identity.json", "protocol.json"
# What a folder holds only after it was claimed.
_AFTERWARDS = {OF_SET: ("manifest.json", "images", OF_SCORES), OF_SCORES: ("results.jsonl",)}


class _Split(BaseModel):
    digest: str
    images: Count
    classes: dict[str, tuple[Count, Annotated[str, Field(pattern="^[0-9a-f]{16}$")]]]


class _Claim(BaseModel):
    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    identity: dict[str, Any]
    data: dict[str, _Split]
    classes: dict[str, str] | None = None
    files: dict[str, Sha256] | None = None


def claim(
    path: Path,
    identity: Mapping[str, Any],
    contents: Mapping[str, SplitContent],
    cache: Path,
    remedy: str,
    **more: Any,
) -> None:
    """Write what makes a folder's content to `path`, or refuse a folder that was made otherwise.

    `contents` are the real images by split, `more` what no key says, such as class names.
    """
    data = {split: asdict(content) for split, content in contents.items()}
    mine = json.loads(json.dumps({"identity": dict(identity), **more}))
    if not path.exists():
        if any((path.parent / name).exists() for name in _AFTERWARDS[path.name]):
            raise _of_an_earlier_version(path.parent, remedy)
        write_json(path, {"format": FORMAT, **mine, "data": data})
        return
    theirs = read_claim(path, remedy)
    _compare_values(path.parent, mine, theirs, remedy)
    for split, content in contents.items():
        _compare_images(path, split, theirs["data"].get(split), content, cache, remedy)


def read_claim(path: Path, remedy: str = "get it again") -> dict[str, Any]:
    """What a folder says that it was made from; `UserError` for a file of another structure."""
    remedy = f"put the old file back, or {remedy}"
    theirs = read_document(path, dict[str, Any], remedy)
    if "format" not in theirs:
        raise _of_an_earlier_version(path.parent, remedy)
    return read_document(path, _Claim, remedy)


def _of_an_earlier_version(folder: Path, remedy: str) -> UserError:
    return UserError(
        f"{folder} was made by an earlier version of this project and is left as it is: {remedy}"
    )


def _compare_values(
    folder: Path, mine: Mapping[str, Any], theirs: Mapping[str, Any], remedy: str
) -> None:
    others = {key: theirs.get(key) for key in mine}
    known = others.get("files") or {}  # sets from before folders were noted know none of them
    noted = {name: digest for name, digest in mine.get("files", {}).items() if name in known}
    ours = _flat(dict(mine) | ({"files": noted} if "files" in mine else {}))
    others = _flat(others)
    differing = [key for key in ours | others if ours.get(key) != others.get(key)]
    if differing:
        changes = ", ".join(
            f"{_short(key)}={ours.get(key)} (there: {others.get(key)})" for key in differing[:5]
        )
        raise UserError(f"{folder} already holds a run with other values: {changes}; {remedy}")


def _compare_images(
    path: Path,
    split: str,
    before: Mapping[str, Any] | None,
    now: SplitContent,
    cache: Path,
    remedy: str,
) -> None:
    if before is None:
        raise UserError(f"{path} does not say which real images it was made from; {remedy}")
    if before["digest"] == now.digest:
        return
    changed, exact = changed_images(before["classes"], now, cache)
    when = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    raise UserError(
        f"{'' if exact else 'up to '}{changed:,} of {now.images:,} {_WORDS[split]} images changed "
        f"since {when}, when {path.parent} was made from {before['images']:,}: put the old ones "
        f"back, or {remedy}"
    )


def _short(key: str) -> str:
    """A dotted key as the command line has it: identity.guidance.values.scale is guidance.scale."""
    return ".".join(part for part in key.split(".") if part not in ("identity", "values"))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def earlier_folders(runs: Path, dataset: str, method: str) -> list[Path]:
    """Sets of one dataset and method that an earlier version of the project has made."""
    found = []
    for path in [*(runs / dataset / method).glob("*/*/identity.json")]:
        try:
            if "format" not in read_document(path, dict[str, Any], ""):
                found.append(path.parent)
        except UserError:
            continue
    return found

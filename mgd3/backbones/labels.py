"""From a dataset's classes to the rows of a label table."""

from __future__ import annotations

from collections.abc import Sequence

from mgd3.data.class_lists import ClassInfo
from mgd3.runtime.errors import UserError


def label_rows(
    classes: Sequence[ClassInfo], num_classes: int, trained_on: Sequence[str] | None, source: str
) -> list[int]:
    """ImageNet's indices, or positions in `trained_on` where the weights say what they know."""
    if trained_on is None:
        rows = {c.wnid: c.imagenet_id for c in classes}
        what = f"is conditioned on ImageNet's first {num_classes} classes"
    else:
        rows = {c.wnid: trained_on.index(c.wnid) for c in classes if c.wnid in trained_on}
        what = f"was trained on {', '.join(trained_on)}"
    found = {w: row for w, row in rows.items() if row is not None and row < num_classes}
    unknown = next((c.wnid for c in classes if c.wnid not in found), None)
    if unknown is not None:
        raise _unknown(source, what, unknown)
    return [found[c.wnid] for c in classes]


def require_imagenet(classes: Sequence[ClassInfo], source: str) -> None:
    """`UserError` for a class that is none of ImageNet's, said before such weights are fetched."""
    for info in classes:
        if info.imagenet_id is None:
            raise _unknown(source, "is conditioned on ImageNet's classes", info.wnid)


def _unknown(source: str, what: str, wnid: str) -> UserError:
    return UserError(
        f"{source} {what} and does not know the class {wnid!r} of this dataset; choose a "
        "text-to-image backbone (backbone=sd15 or sdxl), or train one on your own images with "
        "scripts/train_backbone.py (docs/own_images.md)"
    )

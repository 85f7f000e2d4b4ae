"""Prompts that belong to an image, not to its class: VLCP's caption of each mode (ICCV 2025)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from mgd3.data.captions import captions_of
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.modes.discovery import ClassModes
from mgd3.modes.finders import Modes
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.storage.documents import read_document

FILE = "prompts.json"  # of a set: its prompts by wnid, in the modes' order


class ClassPrompts:
    """Every image of a class is conditioned on the class, as the backbone knows it."""

    needs_modes = False

    def check(self, backbone: Any) -> None:
        """Any backbone will do."""

    def of_modes(
        self, classes: Sequence[ClassInfo], found: Mapping[str, ClassModes]
    ) -> dict[str, list[str]]:
        """None."""
        return {}


class CaptionPrompts:
    """An image's prompt is the caption of a real image of its mode's cluster: see `representative`.

    The captions are a file of the user's (data/captions.py).
    """

    needs_modes = True

    def __init__(self, captions: str, common: float, words: int) -> None:
        """`common` and `words` are `representative`'s."""
        if not isinstance(captions, str) or not captions:
            raise UserError(f"prompts.captions={captions!r} is no file; give a JSON Lines file")
        self.captions = captions
        self.common = checks.number("prompts.common", common, minimum=0, maximum=1)
        self.words = checks.integer("prompts.words", words, minimum=1)
        self._path = Path(captions).expanduser()
        self._captions: list[list[str]] = []  # of the classes, in the inventory's order

    def check(self, backbone: Any) -> None:
        """`UserError` for a backbone (an object or its class) that takes no prompts."""
        if not hasattr(backbone, "prompt_ids"):
            kind = backbone if isinstance(backbone, type) else type(backbone)
            raise UserError(
                f"prompts=captions needs a backbone that takes text, which {kind.__name__} does "
                "not: choose backbone=sd15 or sdxl, or leave prompts=class"
            )

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> None:
        """Read the captions; `UserError` unless every image of the inventory has one."""
        self._captions = captions_of(self._path, dataset, inventory)

    def of_modes(
        self, classes: Sequence[ClassInfo], found: Mapping[str, ClassModes]
    ) -> dict[str, list[str]]:
        """A caption for each mode, by wnid; `fit` comes first."""
        return {
            info.wnid: representative(
                captions, members(found[info.wnid].modes), info, self.common, self.words
            )
            for info, captions in zip(classes, self._captions, strict=True)
        }


def members(modes: Modes) -> list[list[int]]:
    """The real images of each mode; of one that has none, as of identical images, the nearest."""
    found = [(modes.assignment == k).nonzero().flatten().tolist() for k in range(len(modes.counts))]
    return [own or [int(modes.nearest[k])] for k, own in enumerate(found)]


def representative(
    captions: Sequence[str],
    clusters: Sequence[Sequence[int]],
    info: ClassInfo,
    common: float = 0.7,
    words: int = 30,
) -> list[str]:
    """Of each cluster the caption with most of what is frequent there and not in all of its class.

    `clusters` are positions among `captions`. Left out are stop words, parts of the class's names,
    and words in at least the share `common` of all clusters' captions. Of the rest the `words` most
    frequent ones of a cluster count as often as they occur in it; a caption scores those that it
    contains as it is written, in a longer word too (so the released code). Ties go to the first.
    """
    texts = [[captions[i] for i in rows] for rows in clusters]
    having = Counter(word for own in texts for caption in own for word in {*_words([caption])})
    least = common * sum(map(len, texts))
    of_class = {word for word, n in having.items() if n >= least}
    names = info.name.lower()
    chosen = []
    for own in texts:
        frequent = Counter(
            word
            for word in _words(own)
            if word not in ENGLISH_STOP_WORDS and word not in names and word not in of_class
        ).most_common(words)
        scores = [sum(n for word, n in frequent if word in caption) for caption in own]
        chosen.append(own[scores.index(max(scores))])
    return chosen


def _words(captions: Iterable[str]) -> Iterator[str]:
    """Lower-case words of two letters or more; those with a hyphen or a digit are none."""
    for caption in captions:
        for word in re.findall(r"[\w-]+", caption.lower()):
            if word.isalpha() and len(word) > 1:
                yield word


def prompt_rows(backbone: Any, prompts: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """The backbone's rows of prompts by wnid, all encoded at once; none where there are none."""
    if not prompts:
        return {}
    rows = iter(backbone.prompt_ids([prompt for own in prompts.values() for prompt in own]))
    return {wnid: [next(rows) for _ in own] for wnid, own in prompts.items()}


def kept_prompts(folder: Path) -> dict[str, list[str]]:
    """The prompts that a set was made with; `UserError` for one that does not hold them."""
    path = folder / FILE
    try:
        return read_document(path, dict[str, list[str]], "get the set again")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the set does not hold its prompts") from error

"""Real images that a package ships: scikit-learn's handwritten digits, by digit or by parity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import select_classes
from mgd3.runtime import checks

_PARITIES = ("even", "odd")


@dataclass(frozen=True)
class ArrayImage:
    """An 8-bit grey image that a package ships in memory."""

    key: str
    pixels: np.ndarray  # (H, W) uint8

    def stamp(self) -> tuple[int, int]:
        """Never changes."""
        return self.pixels.nbytes, 0

    def content(self) -> bytes:
        """The pixels."""
        return self.pixels.tobytes()

    def decode(self) -> Image.Image:
        """RGB."""
        return Image.fromarray(self.pixels).convert("RGB")


class Digits:
    """scikit-learn's 1,797 real handwritten digits, 8 x 8, split 60/40 and stratified.

    The split is a fixed permutation (seed 0), so every machine has the same 1,078 training and
    719 test images.
    """

    name = "digits"
    skip_broken = False
    location = None
    note = None

    def __init__(self, student_size: int, classes: Sequence[int] | None = None) -> None:
        """`classes` keeps some of the ten digits, in their given order."""
        self.student_size = checks.integer("dataset.student_size", student_size, minimum=4)
        known = tuple(ClassInfo(str(d), f"digit {d}") for d in range(10))
        self.classes = select_classes(known, classes)

    @cached_property
    def _splits(self) -> dict[str, dict[int, list[ArrayImage]]]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), was 0..16
        train, val = train_test_split(
            np.arange(len(pixels)), test_size=0.4, random_state=0, stratify=digits.target
        )
        return {
            split: {
                label: [
                    ArrayImage(f"{split}/{label}/{i:04d}", pixels[i])
                    for i in sorted(rows)
                    if digits.target[i] == label
                ]
                for label in range(10)
            }
            for split, rows in (("train", train), ("val", val))
        }

    def images(self, split: str, label: int) -> Sequence[ArrayImage]:
        """The digits of one class."""
        return self._splits[split][int(self.classes[label].wnid)]


class DigitsParity:
    """The same images and the same split in two classes, even and odd: five hidden modes each.

    Nobody tells a method which digit an image shows, as with the subpopulations of ImageNet's
    superclasses (Santurkar et al. 2021, BREEDS); `parts` knows it, for metrics and for an oracle.
    """

    name = "digits_parity"
    skip_broken = False
    location = None
    note = None

    def __init__(self, student_size: int, classes: Sequence[str] | None = None) -> None:
        """`classes` keeps even or odd alone, or their order."""
        self.student_size = checks.integer("dataset.student_size", student_size, minimum=4)
        self.classes = select_classes(tuple(ClassInfo(p, f"{p} digit") for p in _PARITIES), classes)
        self.parts = Digits(student_size)

    def parts_of(self, label: int) -> list[int]:
        """The digits, as labels of `parts`, that a class consists of."""
        return list(range(_PARITIES.index(self.classes[label].wnid), 10, 2))

    def images(self, split: str, label: int) -> Sequence[ArrayImage]:
        """The digits of one parity in their original order, under names that do not tell them."""
        parts = [self.parts.images(split, digit) for digit in self.parts_of(label)]
        numbered = {image.key.rpartition("/")[2]: image for part in parts for image in part}
        wnid = self.classes[label].wnid
        return [ArrayImage(f"{split}/{wnid}/{n}", numbered[n].pixels) for n in sorted(numbered)]

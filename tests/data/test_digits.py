"""Digits by parity: the same images and split, in two classes that hide five digits each."""

import pytest
import torch

from mgd3.backbones.codecs import PixelCodec
from mgd3.data.digits import Digits, DigitsParity
from mgd3.data.pixels import from_pil, to_unit
from mgd3.modes.oracle import TrueDigitModes
from mgd3.runtime.errors import UserError


def contents(images):
    return sorted(image.content() for image in images)


@pytest.mark.parametrize("split", ["train", "val"])
def test_parities_hold_the_digits_of_both_splits(split):
    digits, parity = Digits(8), DigitsParity(8)
    for label, parts in enumerate(([0, 2, 4, 6, 8], [1, 3, 5, 7, 9])):
        assert parity.parts_of(label) == parts
        own = [image for digit in parts for image in digits.images(split, digit)]
        assert contents(parity.images(split, label)) == contents(own)
    keys = [image.key for image in parity.images(split, 1)]
    assert keys == sorted(keys) and all(key.startswith(f"{split}/odd/") for key in keys)
    assert DigitsParity(8, classes=["odd"]).parts_of(0) == [1, 3, 5, 7, 9]


def latents_of(label):
    images = DigitsParity(8).images("train", label)
    pixels = torch.stack([from_pil(image.decode()) for image in images])
    return PixelCodec(8).encode(to_unit(pixels), ())


@pytest.mark.parametrize("label", [0, 1])
def test_five_true_modes_are_the_means_of_the_digits(label):
    latents = latents_of(label)
    modes = TrueDigitModes()(latents, 5)
    for k, digit in enumerate(DigitsParity(8).parts_of(label)):
        own = torch.stack([from_pil(i.decode()) for i in Digits(8).images("train", digit)])
        mean = PixelCodec(8).encode(to_unit(own), ()).mean(dim=0)
        assert torch.allclose(modes.centers[k], mean, atol=1e-5)
        assert modes.counts[k] == len(own)


@pytest.mark.parametrize("num_modes", [2, 7, 20])
def test_other_numbers_of_true_modes_are_shared_out(num_modes):
    latents = latents_of(0)
    modes = TrueDigitModes()(latents, num_modes)
    assert modes.centers.shape == (num_modes, 1, 8, 8)
    assert modes.counts.sum() == len(latents) and modes.counts.min() > 0


def test_other_images_have_no_true_modes():
    with pytest.raises(UserError, match="modes=true_digits knows scikit-learn's digits alone"):
        TrueDigitModes()(torch.zeros(9, 1, 8, 8), 2)

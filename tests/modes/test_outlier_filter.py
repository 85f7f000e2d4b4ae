"""VLCP's mode finder: what is left out belongs to no mode; the rest is k-means."""

import math

import pytest
import torch
from sklearn.cluster import KMeans
from support import composed

from mgd3.backbones.codecs import PixelCodec
from mgd3.config.build import build
from mgd3.data.digits import Digits
from mgd3.modes.discovery import discover_modes
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError

SHAPE = (2, 4, 4)


def finder(*options):
    return build(composed("modes=kmeans_filtered", *options), "modes")


def draws(count, seed=0):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [11, 20, 31, 101, 250])
def test_a_tenth_is_left_out_and_the_rest_is_kmeans(count):
    latents = draws(count)
    modes = finder("seed=3")(latents, 4)
    left_out = modes.assignment < 0
    assert left_out.sum() in (count // 10, math.ceil(count / 10))
    assert modes.counts.sum() == count - left_out.sum() and modes.counts.min() >= 1
    kept = latents[~left_out]
    reference = KMeans(4, n_init=10, random_state=3).fit(kept.flatten(1).numpy())
    assert modes.assignment[~left_out].tolist() == reference.labels_.tolist()
    for k in range(4):
        mean = latents[modes.assignment == k].mean(dim=0)
        assert torch.allclose(modes.centers[k], mean, atol=1e-5)
    assert not left_out[modes.nearest].any()


def test_what_lies_far_from_the_rest_is_what_is_left_out():
    latents = draws(40)
    latents[[5, 17, 30, 39]] += 25 * draws(4, seed=1).sign()
    modes = finder()(latents, 3)
    assert (modes.assignment < 0).nonzero().flatten().tolist() == [5, 17, 30, 39]
    assert modes.centers.abs().max() < 5


def test_no_share_leaves_nothing_out():
    modes = finder("modes.contamination=0")(draws(9), 3)
    assert modes.assignment.min() == 0 and modes.counts.sum() == 9


def test_each_seed_of_a_set_draws_its_own_modes():
    assert finder("seed=4").random_state == 4


@pytest.mark.parametrize(
    ("count", "num_modes", "enough"),
    [(10, 1, False), (11, 10, True), (11, 11, False), (60, 54, True)],
)
def test_the_fewest_images_are_enough_and_one_less_is_refused(count, num_modes, enough):
    assert (finder().shortfall(count, num_modes) is None) == enough
    if enough:
        assert len(finder()(draws(count), num_modes).centers) == num_modes


def test_a_class_that_is_too_small_is_refused_by_name(tmp_path):
    work = Work(cache=tmp_path / "cache", batch_size=8, workers=1, flip="none")
    few = finder("modes.n_neighbors=107")
    with pytest.raises(UserError, match=r"class \d \(digit \d\) has 10\d usable .*n_neighbors=107"):
        discover_modes(Digits(8), PixelCodec(8), few, 2, work, tmp_path)
    assert not (tmp_path / "modes").exists()


@pytest.mark.parametrize("option", ["contamination=0.6", "n_neighbors=0", "n_init=0"])
def test_wrong_options_are_named(option):
    with pytest.raises(UserError, match=rf"modes\.{option}"):
        finder(f"modes.{option}")

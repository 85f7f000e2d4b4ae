"""Every mode finder on data whose modes are known, and on data that has none."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support import composed

from mgd3.backbones.codecs import PixelCodec
from mgd3.config.build import build
from mgd3.data.digits import Digits
from mgd3.modes.alternatives import (
    BisectingModes,
    DBSCANModes,
    PooledKMeansModes,
    RandomRealModes,
    _means,
)
from mgd3.modes.discovery import cluster, discover_modes
from mgd3.modes.finders import KMeansModes, Modes
from mgd3.runtime.compute import Work

NAMES = (
    "kmeans", "kmeans_closest", "kmeans_pooled", "bisecting", "gmm", "spectral", "dbscan",
    "random_real", "minibatch_kmeans",
)  # fmt: skip
SHAPE = (2, 4, 4)


def finder(name):
    return build(composed(f"modes={name}"), "modes")


def blobs(counts=(30, 20, 15), spread=0.05, seed=0):
    """Clusters around constant latents 0, 4, 8 ..., and the label of each point, shuffled."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=draw)]
    noise = torch.randn(len(labels), *SHAPE, generator=draw)
    return 4.0 * labels.view(-1, 1, 1, 1) + spread * noise, labels


@pytest.mark.parametrize("name", NAMES[:-2])
def test_separate_clusters_are_found(name):
    latents, labels = blobs()
    modes = finder(name)(latents, 3)
    order = modes.centers.flatten(1).mean(dim=1).argsort()
    for k, mode in enumerate(order):
        members = latents[labels == k]
        tolerance = 0.25 if name == "kmeans_closest" else 1e-4
        assert (modes.centers[mode] - members.mean(dim=0)).abs().max() < tolerance
        assert modes.counts[mode] == len(members)
        assert torch.equal(modes.assignment == mode, labels == k)
        distance = (latents - modes.centers[mode]).flatten(1).norm(dim=1)
        assert modes.nearest[mode] == distance.argmin()


def test_halving_never_raises_the_inertia_and_more_starts_help():
    latents = torch.randn(60, *SHAPE, generator=torch.Generator().manual_seed(4))

    def inertia(num_modes, **options):
        modes = BisectingModes(random_state=0, **options)(latents, num_modes)
        assert modes.counts.sum() == 60
        return (latents - modes.centers[modes.assignment]).square().sum().item()

    for starts in (1, 10):
        walk = [inertia(k, n_init=starts) for k in range(1, 13)]
        assert walk == sorted(walk, reverse=True)
    assert inertia(2, n_init=10) < inertia(2)
    assert inertia(6) == inertia(6, n_init=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("count", "num_modes"), [(1, 1), (2, 1), (2, 2), (7, 7), (40, 12)])
def test_any_number_of_modes_up_to_the_images(name, count, num_modes):
    latents = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))
    modes = finder(name)(latents, num_modes)
    assert modes.centers.shape == (num_modes, *SHAPE) and modes.centers.isfinite().all()
    assert modes.counts.sum() == count and modes.counts.min() >= 1
    assert modes.assignment.shape == (count,)
    again = finder(name)(latents, num_modes)
    assert torch.equal(modes.centers, again.centers)
    if num_modes == count:
        assert sorted(modes.nearest.tolist()) == list(range(count))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_identical_images_are_no_error(name):
    modes = finder(name)(torch.ones(9, *SHAPE), 4)
    assert torch.allclose(modes.centers, torch.ones(4, *SHAPE))
    assert modes.counts.sum() == 9


def test_too_few_clusters_are_halved_and_too_many_merged():
    latents, labels = blobs(counts=(12, 6, 2), spread=0.5)
    halved = _means(latents, labels.numpy(), 5)
    parents = [set(labels[halved.assignment == k].tolist()) for k in range(5)]
    assert all(len(parent) == 1 for parent in parents)  # no mode mixes two clusters
    merged = _means(latents, labels.numpy(), 2)
    assert sorted(merged.counts.tolist()) == [8, 12]  # the smallest went to its neighbour
    noise = np.where(labels.numpy() == 2, -1, labels.numpy())
    assert sorted(_means(latents, noise, 2).counts.tolist()) == [8, 12]
    assert _means(latents, np.full(20, -1), 1).counts.tolist() == [20]


def test_images_share_their_modes_mass_and_a_class_counts_as_much_as_before():
    modes = Modes(
        centers=torch.zeros(3, *SHAPE), counts=torch.tensor([30, 20, 10]),
        assignment=torch.zeros(60, dtype=torch.int64), nearest=torch.arange(3),
    )  # fmt: skip
    assert modes.masses_of([0, 1, 2]) == modes.masses == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert modes.masses_of([2, 0, 1]) == [modes.masses[k] for k in (2, 0, 1)]
    twice = modes.masses_of([0, 0, 2])  # one mode kept twice, another not at all
    assert twice == pytest.approx([3 / 8, 3 / 8, 1 / 4])
    cycled = modes.masses_of([0, 1, 2, 0])  # fewer modes than images
    assert cycled == pytest.approx([1 / 4, 1 / 3, 1 / 6, 1 / 4])


def test_the_closest_center_is_a_real_latent():
    latents, _ = blobs(spread=1.0)
    plain, closest = KMeansModes()(latents, 4), KMeansModes(center="closest")(latents, 4)
    assert torch.equal(closest.centers, latents[plain.nearest])
    assert torch.equal(closest.assignment, plain.assignment)


def test_pooling_forgets_what_lies_below_its_grid():
    """A checkerboard of either sign is one cluster once 2 x 2 pixels are averaged."""
    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1
    signs = torch.tensor([1.0, -1.0]).repeat(10).view(20, 1, 1, 1)
    groups = torch.arange(20).div(10, rounding_mode="floor").view(20, 1, 1, 1)
    latents = signs * board * 5 + groups
    by_sign = KMeansModes()(latents, 2).assignment
    assert torch.equal(by_sign == by_sign[0], (signs > 0).flatten())
    by_group = PooledKMeansModes(side=2, random_state=0)(latents, 2)
    assert torch.equal(by_group.assignment == by_group.assignment[0], (groups == 0).flatten())
    assert torch.allclose(by_group.centers.sort(dim=0).values[1], torch.ones(1, 4, 4))


def test_random_modes_are_real_and_follow_their_seed():
    latents, _ = blobs()
    first, second = (RandomRealModes(seed)(latents, 5) for seed in (0, 1))
    assert torch.equal(first.centers, latents[first.nearest])
    assert not torch.equal(first.centers, second.centers)


def test_a_given_radius_is_used():
    latents, labels = blobs()
    assert torch.equal(
        DBSCANModes(eps=1.0, min_samples=3)(latents, 3).counts.sort().values,
        labels.bincount().sort().values,
    )
    one = DBSCANModes(eps=100.0, min_samples=3)(latents, 1)
    assert torch.allclose(one.centers[0], latents.mean(dim=0), atol=1e-5)


def test_a_class_is_clustered_on_one_thread_and_the_rest_keeps_its_own():
    seen = []

    def finder(latents, num_modes):
        seen.append(torch.get_num_threads())
        return KMeansModes()(latents, num_modes)

    before = torch.get_num_threads()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: cluster(finder, blobs()[0], 3), range(4)))
        assert torch.get_num_threads() == before
    assert set(seen) == {1}


def test_classes_clustered_side_by_side_are_those_clustered_in_turn(tmp_path):
    found = []
    for workers in (1, 4):
        work = Work(cache=tmp_path / "c", batch_size=64, workers=workers, flip="none")
        out = tmp_path / str(workers)
        found.append(discover_modes(Digits(8), PixelCodec(8), KMeansModes(), 7, work, out))
    for wnid, one in found[0].items():
        assert torch.equal(one.modes.centers, found[1][wnid].modes.centers)
        assert [i.key for i in one.nearest] == [i.key for i in found[1][wnid].nearest]

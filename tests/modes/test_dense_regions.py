"""CoDA's mode finder: exactly K real images, whatever HDBSCAN finds."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import QUICK, run
from support import composed

from mgd3.backbones.codecs import PixelCodec
from mgd3.config.build import build
from mgd3.data.digits import Digits
from mgd3.modes import dense_regions
from mgd3.modes.discovery import discover_modes
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError

umap = pytest.mark.skipif(find_spec("umap") is None, reason="umap-learn is not installed")
SHAPE = (2, 4, 4)


def finder(*options):
    return build(composed("modes=coda", *options), "modes")


def blobs(counts, spread=0.05, seed=0):
    """Clusters around random latents, and the label of each point, shuffled."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), k) for k, n in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=draw)]
    places = 4 * torch.randn(len(counts), *SHAPE, generator=draw)
    return places[labels] + spread * torch.randn(len(labels), *SHAPE, generator=draw), labels


def parents(modes, labels):
    """Of each mode the labels of what belongs to it."""
    return [set(labels[modes.assignment == k].tolist()) for k in range(len(modes.centers))]


@umap
@pytest.mark.parametrize("center", ["probable", "nearest"])
def test_separate_clusters_are_found_and_a_mode_is_a_member(center):
    latents, labels = blobs((70, 65, 60))
    modes = finder(f"modes.center={center}")(latents, 3)
    assert sorted(map(tuple, parents(modes, labels))) == [(0,), (1,), (2,)]
    assert torch.equal(modes.centers, latents[modes.nearest])
    assert torch.equal(modes.assignment[modes.nearest], torch.arange(3))


@umap
def test_of_too_many_clusters_the_largest_stay_and_too_few_are_halved():
    latents, labels = blobs((90, 70, 60))
    kept = finder()(latents, 2)
    assert {int(labels[k]) for k in kept.nearest} == {0, 1} and kept.counts.sum() == 220
    more = finder()(latents, 7)
    assert all(len(own) == 1 for own in parents(more, labels))
    assert more.counts.min() > 1 and len(set(more.nearest.tolist())) == 7


@umap
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("count", "num_modes"), [(1, 1), (2, 1), (2, 2), (7, 7), (9, 4), (12, 12), (40, 12), (60, 55)]
)
def test_any_number_of_different_real_images(count, num_modes):
    latents = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(2))
    one, again = (finder()(latents, num_modes) for _ in range(2))
    assert len(set(one.nearest.tolist())) == num_modes
    assert torch.equal(one.centers, latents[one.nearest])
    assert one.counts.sum() == count and one.counts.min() >= 1
    assert torch.equal(one.nearest, again.nearest)


@umap
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("count", [9, 30])
def test_identical_images_are_no_error(count):
    modes = finder()(torch.ones(count, *SHAPE), 4)
    assert torch.equal(modes.centers, torch.ones(4, *SHAPE))
    assert len(set(modes.nearest.tolist())) == 4 and modes.counts.sum() == count


@umap
def test_classes_beside_each_other_are_those_in_turn(tmp_path):
    found = []
    for workers in (1, 4):
        work = Work(cache=tmp_path / f"c{workers}", batch_size=8, workers=workers, flip="none")
        dataset = Digits(8, classes=[0, 1, 2])
        out = tmp_path / str(workers)
        found.append(discover_modes(dataset, PixelCodec(8), finder(), 5, work, out))
    for wnid, one in found[0].items():
        assert torch.equal(one.modes.nearest, found[1][wnid].modes.nearest)


def test_halves_are_no_smaller_than_allowed_and_the_largest_come_first():
    where = np.concatenate([np.zeros(8), np.full(4, 1.0), np.full(6, 9.0)])[:, None]
    both = [np.arange(12), np.arange(12, 18)]

    def cut(where, rows):
        return [rows[where[rows, 0] < 0.5], rows[where[rows, 0] > 0.5]]

    sizes = [len(rows) for rows in dense_regions._halved(where, both, 3, 4, cut)]
    assert sorted(sizes) == [4, 6, 8]
    unchanged = dense_regions._halved(where, both, 3, 5, cut)
    assert sorted(len(rows) for rows in unchanged) == [6, 12]


def test_without_umap_it_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(dense_regions, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package umap-learn: pip install umap-learn$"):
        finder()
    done = run(tmp_path, *QUICK, "modes=coda")
    assert done.returncode == 1 and "pip install umap-learn" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.png"))

"""Set metrics against closed forms, brute force and what must not change them."""

import itertools
import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from scipy.linalg import sqrtm
from support import line, normal

from eval.metrics.planes import (
    pca_plane,
    tsne_plane,
)
from eval.metrics.set_metrics import RealFeatures, measure, metrics_layout
from mgd3.modes.finders import KMeansModes
from mgd3.runtime.errors import UserError


def axes_cross(center, reach):
    """Points at center ± reach_i along each axis: their covariance is diagonal."""
    steps = torch.diag(torch.tensor(reach, dtype=torch.float64))
    return torch.tensor(center, dtype=torch.float64) + torch.cat([steps, -steps])


def test_distances_on_a_line():
    real = [line(0, 10, 20), line(5, 6)]
    made = [line(0, 1, 3, 7), line(2)]
    metrics = measure(real, made, neighbors=2)
    assert metrics.diversity == [(1 + 1 + 2 + 4) / 4, None]  # one image has no other
    assert metrics.diversity_mean == 2.0
    assert metrics.pairwise == pytest.approx((1 + 3 + 7 + 2 + 6 + 4) / 6)
    reach = [(0 + 10) / 2, (1 + 9) / 2, (3 + 7) / 2, (7 + 3) / 2]
    assert metrics.representativeness == pytest.approx([sum(reach) / 4, (3 + 4) / 2])
    assert metrics.representativeness_mean == pytest.approx((sum(reach) + 3.5) / 5)
    assert (metrics.num_real, metrics.num_made) == (5, 5)


def test_a_class_smaller_than_the_neighbourhood_counts_whole():
    real, made = [line(0, 10, 20), line(5, 6)], [line(0, 1), line(2)]
    assert measure(real, made, neighbors=50) == measure(real, made, neighbors=3)
    assert measure(real, made, neighbors=3) != measure(real, made, neighbors=2)


def test_one_image_per_class_leaves_values_out_that_json_can_hold():
    metrics = measure([line(0, 1), line(5, 6)], [line(0), line(5)])
    assert (metrics.diversity, metrics.diversity_mean, metrics.pairwise) == (
        [None, None],
        None,
        None,
    )
    assert json.loads(json.dumps(asdict(metrics), allow_nan=False)) == asdict(metrics)


def test_frechet_distance_of_diagonal_gaussians():
    real, made = axes_cross([0, 0, 0], [1, 2, 3]), axes_cross([1, -2, 0], [4, 2, 0])
    stds = [[r * math.sqrt(2 / 5) for r in reach] for reach in ([1, 2, 3], [4, 2, 0])]
    expected = 1 + 4 + sum((a - b) ** 2 for a, b in zip(*stds, strict=True))
    assert measure([real], [made]).frechet == pytest.approx(expected)


def test_frechet_distance_is_the_matrix_root_s_where_that_exists_and_finite_where_not():
    real, made = normal(0, 60, 5) @ normal(1, 5, 5), 1 + normal(2, 40, 5) @ normal(3, 5, 5)
    root = torch.from_numpy(sqrtm((real.T.cov() @ made.T.cov()).numpy()).real)
    shift = (real.mean(0) - made.mean(0)).square().sum()
    expected = shift + (real.T.cov() + made.T.cov() - 2 * root).trace()
    assert measure([real], [made]).frechet == pytest.approx(expected.item())
    # two made images: one direction, whose deviation sqrt(u C u) meets the real one's
    made = made[:2]
    along = made[0] - made[1]
    spread = along.square().sum() / 2
    unit = along / along.norm()
    common = (spread * (unit @ real.T.cov() @ unit)).sqrt()
    shift = (real.mean(0) - made.mean(0)).square().sum()
    expected = shift + real.T.cov().trace() + spread - 2 * common
    assert measure([real], [made]).frechet == pytest.approx(expected.item())


def test_equal_sets_and_far_ones():
    real = [normal(0, 40, 6), 3 + normal(1, 40, 6)]
    same = measure(real, real, k=5)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert same.density == pytest.approx((5 + 1) / 5)  # its own ball, and k on average
    assert same.frechet == pytest.approx(0, abs=1e-10)
    far = measure(real, [r + 1e3 for r in real])
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    assert far.frechet == pytest.approx(6e6)
    assert far.mmd > 1e10 > abs(same.mmd)


def balls_by_hand(real, made, k):
    def radii(points):
        return [sorted(math.dist(p, q) for q in points)[k] for p in points]

    real, made = real.tolist(), made.tolist()
    of_real, of_made = radii(real), radii(made)
    held = [[math.dist(x, y) <= r for y in made] for x, r in zip(real, of_real, strict=True)]
    return (
        sum(any(column) for column in zip(*held, strict=True)) / len(made),
        sum(any(math.dist(x, y) <= r for y, r in zip(made, of_made, strict=True)) for x in real)
        / len(real),
        sum(map(sum, held)) / (k * len(made)),
        sum(map(any, held)) / len(real),
    )


@pytest.mark.parametrize("size", [2, 20])  # a tree finds neighbours among few features
@pytest.mark.parametrize("k", [1, 4])
def test_balls_are_those_of_brute_force(size, k):
    real, made = normal(0, 50, size), 0.5 + 0.7 * normal(1, 30, size)
    metrics = measure([real[:20], real[20:]], [made[:25], made[25:]], k=k)
    found = (metrics.precision, metrics.recall, metrics.density, metrics.coverage)
    assert found == pytest.approx(balls_by_hand(real, made, k))
    assert 0 < metrics.coverage < 1


@pytest.mark.parametrize("size", [1, 64])
def test_a_real_image_touches_its_neighbours_balls_in_spite_of_rounding(size):
    direction = torch.nn.functional.normalize(normal(0, 1, size))
    real = 100 + torch.arange(40.0).double().unsqueeze(1) * direction  # balls of radius 1, ends' 2
    metrics = measure([real], [real[[10, 20, 30]]], k=2)
    assert metrics.coverage == 9 / 40
    assert (metrics.precision, metrics.density) == (1, 3 / 2)


def test_fewer_images_than_k_reach_to_the_last():
    real, made = [normal(0, 30, 3)], [normal(1, 4, 3)]
    assert measure(real, made, k=5).recall == measure(real, made, k=3).recall
    assert measure(made, real, k=5).density == measure(made, real, k=3).density
    assert measure(made, real, k=3).density != measure(made, real, k=2).density


def test_mmd_is_the_double_loop_s():
    real, made = normal(0, 9, 4), 1 + normal(1, 6, 4)

    def mean_kernel(pairs):
        values = [(float(x @ y) / 4 + 1) ** 3 for x, y in pairs]
        return sum(values) / len(values)

    expected = (
        mean_kernel(itertools.permutations(real, 2))
        + mean_kernel(itertools.permutations(made, 2))
        - 2 * mean_kernel(itertools.product(real, made))
    )
    found = measure([real[:4], real[4:]], [made[:1], made[1:]]).mmd
    assert found == pytest.approx(expected)


def test_blocks_of_rows_change_nothing(monkeypatch):
    real, made = [normal(0, 50, 20)], [normal(1, 30, 20)]
    whole = measure(real, made)
    monkeypatch.setattr("eval.metrics.set_metrics._ROWS", 7)
    assert numbers(measure(real, made)) == pytest.approx(numbers(whole))


def test_what_the_real_side_keeps_changes_no_set():
    real, sets = [normal(0, 50, 8), normal(3, 40, 8)], [normal(s, 30, 8) for s in (1, 2)]
    known = RealFeatures(real)
    for k in (5, 3):
        for made in sets:
            halves = [made[:15], made[15:]]
            assert measure(known, halves, k=k) == measure(real, halves, k=k)


def numbers(metrics):
    values = asdict(metrics)
    return [*values.pop("diversity"), *values.pop("representativeness"), *values.values()]


def shuffled(sets):
    draw = torch.Generator().manual_seed(4)
    return [rows[torch.randperm(len(rows), generator=draw)] for rows in sets]


def test_order_and_rotation_do_not_matter():
    real, made = [normal(0, 40, 6), 2 + normal(1, 30, 6)], [normal(2, 9, 6), 2 + normal(3, 5, 6)]
    unseen = [normal(4, 8, 6), 2 + normal(5, 8, 6)]

    def found(real, made, unseen):
        measured = measure(real, made, unseen=unseen)
        return numbers(replace(measured, modes_shown=0))  # k-means starts from the first images

    expected = pytest.approx(found(real, made, unseen), rel=1e-9)
    assert found(shuffled(real), shuffled(made), shuffled(unseen)) == expected
    turn = torch.linalg.qr(normal(9, 6, 6)).Q
    turned = [[rows @ turn for rows in of] for of in (real, made, unseen)]
    assert found(*turned) == expected
    assert found(real, turned[1], unseen) != expected


def test_modes_are_shown_by_the_images_that_they_are_nearest_to():
    """Real images about 0, 10 and 50, and about 5, 6, 7; a class of one image shows no share."""
    real = [line(0, 1, 10, 11, 50, 51), line(5, 5.1, 6, 6.1, 7, 7.1)]
    assert measure(real, [line(2, 9, 60), line(5, 6, 7)]).modes_shown == 1
    assert measure(real, [line(2, 4, 60), line(5, 5.1, 4)]).modes_shown == pytest.approx(
        (2 / 3 + 1 / 3) / 2
    )
    assert measure(real, [line(2), line(5, 6, 7)]).modes_shown == 1
    assert measure(real, [line(2), line(5)]).modes_shown is None
    assert measure(real, [line(*range(7)), line(6)]).modes_shown is None, "no seven modes of six"


def test_modes_in_latents_are_those_that_guidance_steers_to():
    latents = normal(3, 60, 4, 2, 2).float()
    theirs = KMeansModes()(latents, 5).centers.flatten(1)
    ours = RealFeatures([latents.flatten(1)]).modes(0, 5)
    assert torch.allclose(ours.float(), theirs, atol=1e-5)


REAL = [normal(0, 20, 3), normal(1, 20, 3)]
BROKEN = REAL[0].clone()
BROKEN[7, 1] = math.nan


@pytest.mark.parametrize(
    ("real", "made", "message"),
    [
        (REAL, REAL[:1], "made features: 1 classes, the real ones have 2; give one tensor per"),
        (REAL, [REAL[0], REAL[1][:, :2]], "made features, class 1: 2 numbers per image, .* have 3"),
        ([REAL[0], REAL[1][:, :2]], REAL, "real features, class 1: 2 numbers per image, .* have 3"),
        (
            REAL,
            [REAL[0], BROKEN],
            "made features, class 1: image 7 .* not finite; check that image",
        ),
        (REAL, [REAL[0], REAL[1][:0]], r"made features, class 1: shape \(0, 3\) .* needs an image"),
        (REAL, [REAL[0][0], REAL[1]], r"made features, class 0: shape \(3,\) is not \(images, "),
        (REAL[:1], [REAL[0][:1]], "made features: 1 samples in total, at least 2 .* add images"),
        ([REAL[0][:1]], REAL[:1], "real features: 1 samples in total, at least 2"),
        ([], [], "real features: 0 samples in total"),
    ],
)
def test_what_cannot_be_compared_is_named(real, made, message):
    with pytest.raises(UserError, match=message):
        measure(real, made)
    with pytest.raises(UserError, match=message.replace("made features", "features of mine")):
        pca_plane(real, {"mine": made})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: measure(REAL, REAL, neighbors=0), "neighbors=0 is out of range"),
        (lambda: measure(REAL, REAL, k=0), "k=0 is out of range"),
        (lambda: tsne_plane(REAL, {"m": REAL}, most_real=0), "most_real=0 is out of range"),
        (lambda: tsne_plane(REAL, {}), "needs a method"),
        (
            lambda: tsne_plane(REAL, {"m": [r[:5] for r in REAL]}, most_real=10),
            r"more than 30 images, these are 30; add real images \(most_real=10\)",
        ),
        (lambda: pca_plane([line(0, 1)], {"m": [line(0, 1)]}), "features of 2 numbers or more"),
    ],
)
def test_settings_that_make_no_sense(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_copies_are_nearer_to_the_real_than_unseen_images_are():
    draw = torch.Generator().manual_seed(0)
    real, unseen, fresh = (
        [torch.randn(n, 6, generator=draw).double() for _ in range(2)] for n in (80, 60, 60)
    )
    copies = [rows[:40] + 0.001 for rows in real]
    assert measure(real, copies, unseen=unseen).nearer == 1.0
    assert measure(real, unseen, unseen=unseen).nearer == 0.5
    assert abs(measure(real, fresh, unseen=unseen).nearer - 0.5) < 0.1
    far = [rows + 100 for rows in fresh]
    found = measure(real, far, unseen=unseen)
    assert found.nearer == 0.0
    assert metrics_layout({"m": [found]}, "x").headers[-1] == "nearer than unseen (copies: 1)"
    with pytest.raises(UserError, match="unseen features: 1 classes"):
        measure(real, fresh, unseen=unseen[:1])

"""Maps in the plane and the scores read off them: t-SNE as the released script, PCA, panels."""

import os
from dataclasses import replace

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.manifold import TSNE
from support import line, normal

from eval.metrics.planes import (
    CENTERS,
    Plane,
    class_planes,
    pca_plane,
    tsne_plane,
    tsne_points,
    tsne_scores,
)
from eval.metrics.set_metrics import measure, metrics_layout
from eval.reports.drawings.maps import maps_picture


def planar(*places):
    return torch.nn.functional.pad(line(*places), (0, 1))


ON_A_LINE = Plane(
    real=[planar(0), planar(0)],
    made={
        "near": [planar(0, 1), planar(0, 2)],  # nearest 1, 2; to real 0.5, 1
        "far": [planar(2, 5), planar(3, 4, 11)],  # nearest 3, 3; to real 3.5, 6
    },
)


def test_plane_scores_are_scaled_over_all_methods_and_classes():
    scores = tsne_scores(ON_A_LINE)
    assert scores["near"].diversity == [0, pytest.approx(1 / 2)]
    assert scores["far"].diversity == [1, 1]
    assert scores["far"].diversity_mean == 1
    assert scores["near"].representativeness == [1, pytest.approx(1 - 0.5 / 5.5)]
    assert scores["far"].representativeness == [pytest.approx(1 - 3 / 5.5), 0]
    assert scores["far"].representativeness_mean == pytest.approx(1 - (5 - 0.5) / 5.5)


def test_points_of_classes_are_the_class_scores():
    scores, points = tsne_scores(ON_A_LINE), tsne_points(ON_A_LINE, "class")
    for method, found in points.items():
        expected = zip(scores[method].representativeness, scores[method].diversity, strict=True)
        assert found.tolist() == [pytest.approx(pair) for pair in expected]


def test_points_of_images_are_scaled_over_all_images():
    """Distances to real ones 0 to 11, to the nearest 1 to 7."""
    points = tsne_points(ON_A_LINE, "image")
    assert points["near"].tolist() == [
        pytest.approx(p) for p in ([1, 0], [10 / 11, 0], [1, 1 / 6], [9 / 11, 1 / 6])
    ]
    assert points["far"][-1].tolist() == pytest.approx([0, 1])
    assert len(points["far"]) == 5


def test_a_class_of_one_image_has_no_point():
    plane = Plane(real=[planar(0), planar(0)], made={"a": [planar(1), planar(2, 5, 9)]})
    assert len(tsne_points(plane, "image")["a"]) == 3
    assert tsne_points(plane, "class") == {}, "one point has nothing to be scaled against"
    assert tsne_points(Plane(real=[planar(0)], made={"a": [planar(3)]}), "image") == {}


def test_nothing_to_scale_against_is_no_score():
    scores = tsne_scores(Plane(real=[planar(0, 1)], made={"single": [planar(3)]}))["single"]
    assert (scores.diversity, scores.representativeness) == ([None], [None])
    assert (scores.diversity_mean, scores.representativeness_mean) == (None, None)


@pytest.fixture(scope="module")
def features():
    """Two classes apart; «narrow» repeats nearly one image, «wide» is spread as the real ones."""
    real = [normal(0, 40, 60), 8 + normal(1, 30, 60)]
    narrow = [0.01 * normal(2, 5, 60), 8 + 0.01 * normal(3, 5, 60)]
    wide = [normal(4, 5, 60), 8 + normal(5, 5, 60)]
    return real, {"narrow": narrow, "wide": wide}


@pytest.fixture(scope="module")
def plane(features):
    return tsne_plane(*features, most_real=35)


def test_tsne_is_one_map_of_all_methods(features, plane):
    assert [tuple(p.shape) for p in plane.real] == [(35, 2), (30, 2)]  # most_real of each class
    assert {m: [len(p) for p in ps] for m, ps in plane.made.items()} == {
        "narrow": [5, 5],
        "wide": [5, 5],
    }
    again = tsne_plane(*features, most_real=35)
    assert all(map(torch.equal, plane.real, again.real))
    first, second = (p.mean(dim=0) for p in plane.real)
    for points in plane.made.values():
        for mine, other, own in ((first, second, points[0]), (second, first, points[1])):
            assert ((own - mine).norm(dim=1) < (own - other).norm(dim=1)).all()


def test_a_map_that_was_fitted_is_not_fitted_again(features, plane, tmp_path):
    """Else it would be written again; other features have another file."""
    for first in (True, False):
        kept = tsne_plane(*features, most_real=35, keep=tmp_path)
        assert all(map(torch.equal, plane.real, kept.real))
        (file,) = tmp_path.iterdir()
        if first:
            os.utime(file, (1, 1))
    assert file.stat().st_mtime == 1
    tsne_plane(*features, most_real=34, keep=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    file.write_bytes(file.read_bytes()[:-8])  # damaged: fitted again
    again = tsne_plane(*features, most_real=35, keep=tmp_path)
    assert all(map(torch.equal, plane.real, again.real))


def test_tsne_is_the_released_scripts(features):
    """TSNE(n_components=2, learning_rate="auto", random_state=42) on the features as they are."""
    real, made = features
    points = torch.cat([*real, *made["narrow"], *made["wide"]]).numpy()
    theirs = TSNE(n_components=2, learning_rate="auto", random_state=42).fit_transform(points)
    ours = tsne_plane(real, made)
    together = torch.cat([*ours.real, *ours.made["narrow"], *ours.made["wide"]])
    assert torch.equal(together, torch.from_numpy(theirs).double())


def test_planes_of_one_class_hold_its_centres(features):
    real, made = features
    planes = class_planes(real, made, {"first": 0})
    assert list(planes) == ["first"]
    (points,) = planes["first"].real
    assert (len(points), list(planes["first"].made)) == (40, ["narrow", "wide", CENTERS])
    centres = KMeans(5, random_state=0, n_init="auto").fit(real[0].numpy()).cluster_centers_
    alone = tsne_plane(real[:1], {m: rows[:1] for m, rows in made.items()} | {
        CENTERS: [torch.from_numpy(centres)]
    })  # fmt: skip
    assert torch.equal(planes["first"].made[CENTERS][0], alone.made[CENTERS][0])


def test_tsne_scores_tell_narrow_from_wide(plane):
    scores = tsne_scores(plane)
    values = [v for s in scores.values() for v in s.diversity]
    assert (min(values), max(values)) == (0, 1)
    assert scores["narrow"].diversity_mean < scores["wide"].diversity_mean


def test_pca_axes_are_the_real_images(features):
    real, made = features
    plane = pca_plane(real, made)
    pooled = torch.cat(real)
    axes = torch.linalg.svd(pooled - pooled.mean(0), full_matrices=False).Vh[:2]
    expected = (made["wide"][1] - pooled.mean(0)) @ axes.T
    assert torch.allclose(plane.made["wide"][1].abs(), expected.abs())
    alone = pca_plane(real, {"wide": made["wide"]})
    assert all(map(torch.equal, plane.real, alone.real))


def test_maps_hold_a_panel_per_plane_and_method(features, plane):
    picture, png = maps_picture({"t-SNE": plane, "PCA": pca_plane(*features)})
    assert png.startswith(b"\x89PNG")
    assert picture.startswith("<svg")
    assert picture.rstrip().endswith("</svg>")
    titles = ["<!-- narrow -->", "<!-- wide -->", "<!-- t-SNE -->", "<!-- PCA -->"]
    assert [picture.count(t) for t in titles] == [1, 1, 1, 1]
    assert sum(picture.count(f'id="axes_{i}"') for i in range(1, 9)) == 4
    assert picture == maps_picture({"t-SNE": plane, "PCA": pca_plane(*features)})[0]


def test_the_table_holds_means_and_leaves_unknown_cells_empty(features, plane):
    real, made = features
    wide = measure(real, made["wide"])
    sets = {
        "wide": [replace(wide, coverage=0.2), replace(wide, coverage=0.4)],
        "narrow": [measure(real, made["narrow"])],
        "one": [measure(real, [rows[:1] for rows in made["wide"]])],
    }
    table = metrics_layout(sets, "convnet3", tsne_scores(plane))
    assert "convnet3" in table.title
    lines = {line[0]: dict(zip(table.headers, line, strict=True)) for line in table.lines}
    assert lines["wide"]["coverage ↑"] == "0.3 ± 0.1"
    assert (lines["wide"]["n"], lines["wide"]["images"], lines["one"]["images"]) == ("2", "10", "2")
    assert lines["narrow"]["Fréchet ↓"] == f"{sets['narrow'][0].frechet:.4g} ± –"
    assert lines["one"]["diversity ↑"] == lines["one"]["t-SNE diversity ↑"] == ""
    assert lines["wide"]["t-SNE diversity ↑"] == f"{tsne_scores(plane)['wide'].diversity_mean:.4g}"
    assert metrics_layout(sets, "convnet3").headers[-1] == "MMD² ↓"

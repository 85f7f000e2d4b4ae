"""Herding and k-center against brute force; the features they measure with."""

import json
from itertools import combinations

import pytest
import torch
from conftest import run
from support import composed
from torch import nn

from eval.metrics.features import StudentFeatures, features_and_logits
from eval.students.registry import make_student
from mgd3.config.build import build_distiller
from mgd3.config.schema import plain
from mgd3.data.digits import Digits
from mgd3.data.inventory import take_inventory
from mgd3.distillers.coresets import Herding, KCenter
from mgd3.runtime.errors import UserError
from mgd3.storage.tensors import save_tensors


def choose(kind, points, count):
    return kind(features=None, work=None).choose(points, count)


def test_herding_is_the_greedy_sum_of_the_protocol():
    points = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = choose(Herding, points, 5)
    for k in range(5):
        gaps = {
            i: ((k + 1) * points.mean(0) - points[rows[:k]].sum(0) - points[i]).norm().item()
            for i in range(12)
            if i not in rows[:k]
        }
        assert rows[k] == min(gaps, key=gaps.get)
    assert sorted(choose(Herding, points, 12)) == list(range(12))


def test_k_center_is_within_twice_the_best_radius():
    points = torch.randn(10, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def radius(rows):
        return torch.cdist(points, points[list(rows)]).min(dim=1).values.max().item()

    rows = choose(KCenter, points, 3)
    assert rows[0] == int((points - points.mean(0)).norm(dim=1).argmin())
    assert radius(rows) <= 2 * min(radius(c) for c in combinations(range(10), 3))
    assert sorted(choose(KCenter, torch.ones(4, 2), 4)) == [0, 1, 2, 3]


def test_features_are_what_the_classifier_sees():
    net = make_student("resnetap10_w8", 5, 32, seed=0).eval()
    images = torch.randn(3, 3, 32, 32)
    features, logits = features_and_logits(net, images)
    *_, classifier = (m for m in net.modules() if isinstance(m, nn.Linear))
    with torch.inference_mode():
        assert torch.allclose(classifier(features), net(images), atol=1e-6)
        assert torch.equal(logits, net(images))


def features(tmp_path, **options):
    cfg = composed("method=herding", "features.student=convnet2_w8", "features.epochs=2")
    values = {
        k: v for k, v in plain(cfg.features).items() if k not in ("_target_", "version", "reads")
    }
    return StudentFeatures(
        **values | options,
        device=torch.device("cpu"),
        cache=tmp_path,
        workers=1,
    )


def test_the_network_is_trained_once_and_other_networks_are_refused(tmp_path):
    dataset = Digits(8)
    inventory = take_inventory(dataset, "train", 1, tmp_path, 1)
    first = features(tmp_path).fit(dataset, inventory)
    assert [len(first.real(c)) for c in range(10)] == [len(found.images) for found in inventory]
    (path,) = (tmp_path / "students").glob("*.safetensors")
    stamp = path.stat().st_mtime_ns
    again = features(tmp_path).fit(dataset, inventory)
    assert all(torch.equal(first.real(c), again.real(c)) for c in range(10))
    assert path.stat().st_mtime_ns == stamp
    given = features(tmp_path / "elsewhere", weights=str(path)).fit(dataset, inventory)
    assert torch.equal(given.real(3), first.real(3))
    with pytest.raises(UserError, match=r"features\.weights=none\.safetensors does not exist"):
        features(tmp_path, weights="none.safetensors")
    net = make_student("convnet2_w8", 10, 8, seed=0)
    save_tensors(tmp_path / "cats.safetensors", net.state_dict(), {"classes": '["cat"]'})
    with pytest.raises(UserError, match="is not a convnet2_w8 of these 10 classes"):
        features(tmp_path, weights=str(tmp_path / "cats.safetensors")).fit(dataset, inventory)
    with pytest.raises(UserError, match="is not a convnet2_w16 of these 10 classes"):
        features(tmp_path, student="convnet2_w16", weights=str(path)).fit(dataset, inventory)


@pytest.mark.parametrize("name", ["herding", "k_center"])
def test_other_methods_do_not_depend_on_the_protocol_but_these_do(name):
    assert build_distiller(composed(f"method={name}"))
    assert plain(composed("method=random").features) in ({}, None)
    assert plain(composed(f"method={name}").features)["recipe"]["name"] == "hard_label"


def test_a_run_chooses_real_images(tmp_path):
    done = run(
        tmp_path, "method=herding", "ipc=2", "tracker=none", "report=false", "features.epochs=1",
        "features.student=convnet2_w8", "students=[convnet2_w8]",
        "protocol.epochs_by_ipc=[[null,2]]", "compute.device=cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    assert len(list(tmp_path.rglob("images/*/*.png"))) == 20


@pytest.mark.parametrize("method", ["herding", "k_center"])
def test_features_may_be_those_of_a_student_with_fresh_weights(tmp_path, method):
    """No network is trained first, and the choice is the same each time."""
    chosen = []
    for name in ("one", "two"):
        cwd = tmp_path / name
        cwd.mkdir()
        done = run(
            cwd, f"method={method}", "features=random_students", "features.student=convnet2_w8",
            "ipc=2", "tracker=none", "report=false", "students=[]", "compute.device=cpu",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-1500:]
        assert not list(cwd.rglob("students/*.safetensors"))
        (manifest,) = cwd.rglob("manifest.json")
        chosen.append([i["nearest_real"] for i in json.loads(manifest.read_text())["images"]])
    assert chosen[0] == chosen[1] and len(set(chosen[0])) == 20


def test_fresh_weights_are_no_teacher():
    with pytest.raises(UserError, match="knows the classes; add features=student"):
        build_distiller(composed("pool=2", "select=teacher_correct", "features=random_students"))

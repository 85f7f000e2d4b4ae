"""A student on its way through the full real set: states, kept snapshots, real gradients."""

import re
from types import SimpleNamespace

import pytest
import torch
from support import composed
from torch import nn
from torch.nn import functional as F

from eval.images import student_pixels
from eval.metrics.gradients import StudentSnapshot, distinct
from eval.metrics.surrogates import TrajectorySurrogate
from eval.protocols import trajectory
from eval.protocols.augmentation import normalise
from mgd3.config.build import build
from mgd3.data.inventory import take_inventory
from mgd3.runtime.errors import UserError
from mgd3.storage.tensors import load_tensors

SMALL = ("dataset.classes=[0,1,7]", "surrogate.student=convnet2_w4", "surrogate.epochs=3",
         "surrogate.lr=0.05", "surrogate.images=20")  # fmt: skip


class Place:
    """One cache, and surrogates and digits of some configuration in it."""

    def __init__(self, cache):
        self.cache = cache

    def surrogate(self, *overrides) -> TrajectorySurrogate:
        cfg = composed("surrogate=trajectory", *SMALL, *overrides)
        here = dict(device=torch.device("cpu"), cache=self.cache, workers=1)
        return build(cfg, "surrogate", **here)

    def fit(self, *overrides):
        dataset = build(composed("surrogate=trajectory", *SMALL, *overrides), "dataset")
        inventory = take_inventory(dataset, "train", 1, self.cache, 1)
        return self.surrogate(*overrides).fit(dataset, inventory)

    def files(self, folder):
        return {p.name: p.read_bytes() for p in self.cache.glob(f"{folder}/**/*.safetensors")}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("cache"))
    trajectory = place.fit("surrogate.snapshots=[0,2,3]")
    (kept,) = place.cache.glob("surrogates/*.safetensors")
    return SimpleNamespace(place=place, trajectory=trajectory, kept=kept)


def other_place(tmp_path, fitted):
    """Another cache, and the file of kept snapshots of the first one."""
    return Place(tmp_path), f"surrogate.weights={fitted.kept}"


def test_an_epoch_is_kept_where_gradients_turned_since_the_last_kept_one():
    angles = [0, 10, 44, 50, 80, 100, 140, 141]
    asked = []

    def cosine(kept, epoch):
        asked.append((kept, epoch))
        return torch.tensor(angles[epoch] - angles[kept]).deg2rad().cos().item()

    assert distinct(range(8), cosine, 0.7) == [0, 3, 5]  # more than 45.6 degrees apart
    assert asked[:4] == [(0, 1), (0, 2), (0, 3), (3, 4)]
    assert distinct(range(8), cosine, -1) == [0]


def test_states_lie_in_a_file_each_from_the_untrained_on(fitted):
    files = fitted.place.files("trajectories")
    assert sorted(files) == [f"{e:04d}.safetensors" for e in range(4)]
    fresh = fitted.place.surrogate().network.fresh(SimpleNamespace(classes="abc")).state_dict()
    states = [dict(s.state) for s in fitted.trajectory.snapshots]
    assert all(torch.equal(fresh[name], states[0][name]) for name in fresh)
    (folder,) = fitted.place.cache.glob("trajectories/*/")
    for epoch, state in zip((0, 2, 3), states, strict=True):
        on_disk = load_tensors(folder / f"{epoch:04d}.safetensors")
        assert all(torch.equal(on_disk[name], state[name]) for name in on_disk)
    assert not torch.equal(states[1]["classifier.weight"], states[2]["classifier.weight"])


def test_real_gradients_are_those_of_the_first_images(fitted):
    place, trajectory = fitted.place, fitted.trajectory
    dataset = build(composed("surrogate=trajectory", *SMALL), "dataset")
    images = [i.decode() for i in dataset.images("train", 1)[:20]]
    pixels = torch.stack([student_pixels(i, 8) for i in images]).float() / 255
    net = place.surrogate().network.fresh(dataset).eval()
    for snapshot, real in zip(trajectory.snapshots, trajectory.real(1), strict=True):
        net.load_state_dict(snapshot.state)
        net.zero_grad()
        F.cross_entropy(net(normalise(pixels)), torch.full((20,), 1)).backward()
        expected = torch.cat([p.grad.flatten() for p in net.parameters()])
        assert torch.allclose(real, expected, atol=1e-6) and real.norm() > 0
    assert len(place.files("gradients")) == 3 * 3


def test_what_is_there_is_read_and_not_made_again(fitted, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in fitted.place.cache.rglob("*.safetensors")}
    again = fitted.place.fit("surrogate.snapshots=[0,2,3]")
    assert {p: p.stat().st_mtime_ns for p in fitted.place.cache.rglob("*.safetensors")} == before
    assert torch.equal(again.real(2), fitted.trajectory.real(2))
    place, weights = other_place(tmp_path, fitted)
    elsewhere = place.fit(weights)
    assert not list(tmp_path.glob("trajectories")) and not list(tmp_path.glob("surrogates"))
    assert torch.equal(elsewhere.real(2), fitted.trajectory.real(2))


def test_the_rule_chooses_by_the_gradients_of_all_classes(fitted):
    chosen = fitted.place.fit("surrogate.threshold=1.0")  # every epoch turns them a little
    assert len(chosen.snapshots) == 4
    real = torch.stack([chosen.real(c) for c in range(3)])
    near = F.cosine_similarity(real[:, :1], real, dim=2).mean(dim=0)  # (4,) to the first
    below = (near[1].item() + near[2].item()) / 2
    kept = fitted.place.fit(f"surrogate.threshold={below}")
    first = next(e for e in (1, 2, 3) if near[e] < below)
    states = [s.state["classifier.weight"] for s in (kept.snapshots[1], chosen.snapshots[first])]
    assert torch.equal(*states)


def test_a_stopped_training_ends_with_the_same_states(fitted, tmp_path, monkeypatch):
    place, seen, write = Place(tmp_path), [], trajectory.TENSORS.write

    class StopError(Exception):
        """In the middle of it."""

    def stopping(path, value, key):
        seen.append(path.name)
        if len(seen) == 3:
            raise StopError
        return write(path, value, key)

    monkeypatch.setattr(trajectory.TENSORS, "write", stopping)
    with pytest.raises(StopError):
        place.fit("surrogate.snapshots=[0,2,3]")
    monkeypatch.undo()
    assert sorted(place.files("trajectories")) == ["0000.safetensors", "0001.safetensors"]
    place.fit("surrogate.snapshots=[0,2,3]")
    for folder in ("trajectories", "surrogates", "gradients"):
        expected = fitted.place.files(folder)
        assert all(expected[name] == data for name, data in place.files(folder).items()), folder
    assert not list(tmp_path.rglob("*.part"))


def test_a_damaged_state_is_made_again(fitted, tmp_path):
    place = Place(tmp_path)
    place.fit("surrogate.snapshots=[0,2,3]")
    (damaged,) = tmp_path.glob("trajectories/*/0001.safetensors")
    damaged.write_bytes(b"torn")
    place.fit("surrogate.snapshots=[0,1,3]")  # another choice among the same states
    assert place.files("trajectories") == fitted.place.files("trajectories")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dataset.classes=[0,1,8]"], r"3 other classes \(0, 1, 7\) than these 3 \(0, 1, 8\)"),
        (["dataset.classes=[1,0,7]"], r"other classes \(0, 1, 7\) than these 3 \(1, 0, 7\)"),
        (["surrogate.image_size=12"], r"images of 8 px; set surrogate.image_size=8 \(now 12\)"),
        (["surrogate.student=convnet2_w6"], r"is not a checkpoint of this network"),
    ],
)
def test_snapshots_of_others_are_refused(fitted, tmp_path, overrides, said):
    place, weights = other_place(tmp_path, fitted)
    with pytest.raises(UserError, match=said) as refused:
        place.fit(weights, *overrides)
    assert "surrogate.weights=" in str(refused.value)


def test_a_file_of_something_else_is_refused(fitted, tmp_path):
    (state, *_) = fitted.place.cache.glob("trajectories/*/0000.safetensors")
    for path, said in ((state, "holds no snapshots"), (tmp_path / "none", "does not exist")):
        with pytest.raises(UserError, match=said):
            Place(tmp_path).fit(f"surrogate.weights={path}")


@pytest.mark.parametrize(
    "overrides", [["surrogate.lr=0"], ["surrogate.snapshots=[0]"]], ids=["no rate", "untrained"]
)
def test_a_student_that_guesses_is_refused(fitted, overrides):
    with pytest.raises(UserError) as refused:
        fitted.place.fit(*overrides)
    pattern = (
        r"surrogate: convnet2_w4 after epoch 0 has top-1 [\d.]+ % on \d+ real test images "
        r"\(untrained [\d.]+ %\), and chance is 33\.3 %.*"
        r"raise surrogate\.epochs \(now 3\) or surrogate\.lr \(now 0"
    )
    assert re.search(pattern, str(refused.value)), refused.value


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["surrogate.snapshots=[0,4]"], r"surrogate\.snapshots=4 .*0\.\.3"),
        (["surrogate.snapshots=[]"], r"surrogate\.snapshots=\[\] is no list"),
        (["surrogate.threshold=2"], r"surrogate\.threshold=2"),
        (["surrogate.images=0"], r"surrogate\.images=0"),
        (["surrogate.inputs=raw"], r"surrogate\.inputs='raw' is unknown.*imagenet, decoder"),
        (["surrogate.image_size=2"], r"surrogate\.image_size=2"),
        (["surrogate.lr=fast"], r"surrogate\.lr='fast'"),
    ],
)
def test_wrong_values_are_refused(tmp_path, overrides, said):
    with pytest.raises(UserError, match=said):
        Place(tmp_path).surrogate(*overrides)


def snapshot(net, size=8, inputs="imagenet"):
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    return StudentSnapshot(net, state, size, inputs)


def test_batch_norm_looks_at_one_image_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                        nn.Linear(4 * 36, 3))  # fmt: skip
    net(torch.randn(20, 3, 8, 8))  # running statistics
    one, images = snapshot(net.eval()), torch.randn(2, 3, 8, 8)
    apart = [one.gradient(image[None], 1) for image in images]
    assert torch.allclose(one.gradient(images, 1), sum(apart) / 2, atol=1e-6)
    assert all(torch.equal(t, one.state[n]) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("inputs", ["imagenet", "decoder"])
def test_images_of_another_size_are_resized_and_have_a_gradient(inputs):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3))
    one, image = snapshot(net, inputs=inputs), torch.randn(1, 3, 24, 24).requires_grad_()
    found = one.gradient(image, 2)
    (to_image,) = torch.autograd.grad(found.square().sum(), image)
    assert (to_image != 0).all()
    small = F.interpolate(image.detach(), (8, 8), mode="bilinear", antialias=True)
    assert torch.allclose(found, one.gradient(small, 2), atol=1e-6)
    shown = small if inputs == "decoder" else normalise((small + 1) / 2)
    loss = F.cross_entropy(net(shown), torch.tensor([2]))
    expected = torch.autograd.grad(loss, list(net.parameters()))
    assert torch.allclose(found, torch.cat([g.flatten() for g in expected]), atol=1e-6)

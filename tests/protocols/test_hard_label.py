"""The hard-label protocol's numbers, students by name, and training that can be interrupted."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import composed
from torch import nn
from torchvision.transforms import functional as tv

import eval.protocols.training
from eval.images import TestImages, student_pixels
from eval.metrics.features import features_and_logits
from eval.pixel_files import held_or_mapped
from eval.protocols.answers import Answers
from eval.protocols.augmentation import Augmentation
from eval.protocols.hard_label import HardLabel, HardTargets, _cross_entropy
from eval.protocols.recipe import Recipe, Steps
from eval.protocols.training import StudentTraining, predicted
from eval.students.registry import find_student, make_student
from mgd3.config.build import build_protocol
from mgd3.config.schema import plain
from mgd3.data.digits import Digits
from mgd3.data.pixels import to_pil
from mgd3.runtime.errors import UserError

CPU = torch.device("cpu")
RECIPE = Recipe(
    epochs=6, batch_size=8, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, decay="all",
    schedule=Steps(milestones=(4, 5), gamma=0.2), tests=(2, 4, 6), precision="float32",
)  # fmt: skip
AUGMENTATION = Augmentation(
    crop_scale=(0.5, 1.0), crop_ratio=(0.75, 4 / 3), flip=0.5, jitter=0.4, lighting=0.1, cutmix=1.0
)


def protocol(*overrides):
    return build_protocol(composed("dataset=imagenette", "dataset.root=unused", *overrides))


@pytest.mark.parametrize(
    ("ipc", "classes", "epochs", "milestones", "every"),
    [
        (1, 10, 3000, (2000, 2500), 30),
        (10, 10, 2000, (1333, 1666), 20),
        (20, 10, 1500, (1000, 1250), 15),
        (50, 10, 1500, (1000, 1250), 15),
        (100, 10, 1000, (666, 833), 10),
        (300, 10, 500, (333, 416), 5),
        (1000, 10, 300, (200, 250), 3),
        (1, 100, 2000, (1333, 1666), 20),
        (10, 100, 1300, (866, 1083), 13),
        (50, 100, 1000, (666, 833), 10),
        (100, 100, 600, (400, 500), 6),
        (300, 100, 300, (200, 250), 3),
        (500, 100, 300, (200, 250), 3),
        (1300, 100, 300, (200, 250), 3),  # the full set: --epochs 300, not two thirds of it
        (10, 1000, 2000, (1333, 1666), 20),
    ],
)
def test_epochs_milestones_and_tests(ipc, classes, epochs, milestones, every):
    recipe = protocol().recipe(ipc, classes, "convnet6")
    assert (recipe.epochs, recipe.schedule.milestones) == (epochs, milestones)
    assert recipe.tests == (*range(every, epochs, every), epochs)
    many = classes > 100
    assert (recipe.lr, recipe.weight_decay, recipe.batch_size) == (
        (0.1, 1e-4, 128) if many else (0.01, 5e-4, 64)
    )


def test_adamw_takes_the_place_of_sgd_alone():
    """Of IGD and DMGD: epochs, milestones, batches and augmentation are those of SGD's."""
    sgd, adamw = (protocol(f"protocol={n}") for n in ("hard_label", "hard_label_adamw"))
    for classes in (10, 1000):
        one, two = (p.recipe(10, classes, "convnet3") for p in (sgd, adamw))
        changed = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}
        assert two == dataclasses.replace(one, **changed)
    assert adamw.augmentation == sgd.augmentation
    net = make_student("convnet3", 10, 32, seed=0)
    optimizer = two.make_optimizer(net)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)
    assert len(group["params"]) == len(list(net.parameters()))  # biases and norms decay as well


def test_epochs_stand_in_place_of_the_whole_table():
    short, whole = protocol("protocol.epochs=20"), protocol("protocol.epochs_by_ipc=[[null,20]]")
    for ipc, classes in ((1, 10), (10, 100), (600, 1000)):
        assert short.epochs(ipc, classes) == 20
    assert short.recipe(10, 10, "convnet6") == whole.recipe(10, 10, "convnet6")


def test_an_ipc_without_a_row_is_refused():
    with pytest.raises(UserError, match=r"no row for ipc=20.* or give protocol\.epochs=300"):
        protocol("protocol.epochs_by_ipc=[[10,5]]").recipe(20, 10, "convnet6")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs_by_ipc=[[null,0]]", r"epochs_by_ipc=0 is out of range"),
        ("epochs=0", r"protocol\.epochs=0 is out of range"),
        (
            "epochs_by_ipc=5",
            r"5 must be a pair.* write protocol\.epochs_by_ipc=\[\[10,",
        ),
        (
            "optimization.optimizer=adam",
            r"protocol\.optimization\.optimizer='adam' is unknown.*sgd",
        ),
        ("optimization.milestones=[1/0]", r"optimization\.milestones: '1/0' is not a fraction"),
        ("optimization.milestones=2/3", r"milestones='2/3' must be a list of fractions"),
        ("optimization.lr=x", r"protocol\.optimization\.lr='x' is not a number"),
        ("optimization.batch_size=0", r"protocol\.optimization\.batch_size=0 is out of range"),
        ("many_classes.lr=x", r"protocol\.many_classes\.lr='x'"),
        ("augmentation.crop_scale=[1.0,0.5]", r"augmentation\.crop_scale=.* must be \[low, high\]"),
        ("augmentation.crop_ratio=1", r"augmentation\.crop_ratio=1 must be \[low, high\]"),
        ("augmentation.cutmix=2", r"protocol\.augmentation\.cutmix=2 is out of range"),
        ("augmentation=none", r"augmentation='none' must be a mapping of crop_scale, crop_ratio"),
    ],
)
def test_wrong_protocol_values_are_named(override, message):
    with pytest.raises(UserError, match=message):
        protocol(f"protocol.{override}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+protocol.optimization.lrr=1", r"optimization='lrr' is unknown\. Did you mean lr\?"),
        ("+protocol.many_classes.least=1", r"many_classes='least' .*Allowed: above, lr"),
        ("+protocol.augmentation.patches=2", r"augmentation='patches' .*Allowed: crop_scale"),
        ("~protocol.optimization.gamma", r"protocol\.optimization\.gamma is not set"),
    ],
)
def test_unknown_and_missing_nested_keys_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        protocol(override)


def test_the_training_precision_comes_from_outside():
    options = plain(composed("dataset=imagenette", "protocol=hard_label").protocol)
    left = ("_target_", "version", "family", "reads", "students")
    kept = {k: v for k, v in options.items() if k not in left}
    assert HardLabel(**kept).recipe(10, 10, "convnet6").precision == "float32"
    fast = HardLabel(**kept, training_precision="bfloat16")
    assert fast.recipe(10, 10, "convnet6").precision == "bfloat16"
    with pytest.raises(UserError, match=r"compute\.training_precision='half'"):
        HardLabel(**kept, training_precision="half")


def test_a_protocol_says_what_students_see():
    assert (protocol().labels, protocol().augmented) == ("hard", True)
    assert not protocol("protocol=hard_label_noaug").augmented
    assert protocol("protocol=hard_label_noaug", "protocol.augmentation.cutmix=0.5").augmented
    off = ("jitter=0", "lighting=0", "flip=0", "cutmix=0", "crop_scale=[1,1]", "crop_ratio=[1,1]")
    assert not protocol(*(f"protocol.augmentation.{o}" for o in off)).augmented


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("convnet6", (754_570, 858_340, 1_896_040)),
        ("resnetap10", (4_910_922, 4_957_092, 5_418_792)),
        ("resnet18", (11_181_642, 11_227_812, 11_689_512)),
    ],
)
def test_parameter_counts_of_the_papers_students(name, parameters):
    for classes, expected in zip((10, 100, 1000), parameters, strict=True):
        student = make_student(name, classes, 224, seed=0)
        assert sum(p.numel() for p in student.parameters()) == expected


def test_fresh_students_depend_on_their_seed_alone():
    torch.manual_seed(1)
    first = make_student("resnetap10_w8", 10, 32, seed=3).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = make_student("resnetap10_w8", 10, 32, seed=3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    other = make_student("resnetap10_w8", 10, 32, seed=4).state_dict()
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


@pytest.mark.parametrize("name", ["convnet3", "resnetap18_w8", "resnet10", "timm/resnet18"])
@pytest.mark.parametrize("size", [32, 72])
def test_students_classify_images_of_any_size(name, size):
    logits = make_student(name, 7, size, seed=0)(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet19", "convnet9", "timm/resnet_none", "vgg"])
def test_unknown_students_are_refused(name):
    with pytest.raises(UserError, match="students"):
        find_student(name, 32)


def data(count=20):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=draw, dtype=torch.uint8)
    return pixels, torch.arange(count) % 4


def training(path, recipe=RECIPE):
    student = make_student("convnet2_w8", 4, 8, seed=0)
    return StudentTraining(student, recipe, HardTargets(AUGMENTATION), 0, path)


class KilledError(Exception):
    pass


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    monkeypatch.setattr(eval.protocols.training, "_CHECKPOINT_SECONDS", 0.0)
    whole = training(tmp_path / "whole")
    history = whole.fit(*data(), data(), lambda h: None)

    calls = 0

    def kill_after_three(history):
        nonlocal calls
        calls += 1
        if calls == 4:  # three epochs are saved, the fourth is not
            raise KilledError

    with pytest.raises(KilledError):
        training(tmp_path / "cut").fit(*data(), data(), kill_after_three)
    resumed = training(tmp_path / "cut")
    assert resumed.epoch == 3
    assert resumed.fit(*data(), data(), lambda h: None).tested == history.tested
    for ours, theirs in zip(resumed.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_best_and_last_are_told_apart(tmp_path):
    history = training(tmp_path / "x").fit(*data(), data(), lambda h: None)
    assert [epoch for epoch, _ in history.tested] == [2, 4, 6]
    assert history.top1_last == history.tested[-1][1]
    assert history.top1_best == max(top1 for _, top1 in history.tested)


def test_accuracy_counts_right_answers(tmp_path):
    class SaysTwo(nn.Module):
        def forward(self, x):
            return torch.eye(4)[2].expand(len(x), 4)

    trained = training(tmp_path / "x")
    trained.student = SaysTwo()
    pixels, labels = data(7)
    assert trained.accuracy(pixels, labels) == pytest.approx(200 / 7)  # labels 0 1 2 3 0 1 2


def test_learning_rate_follows_the_milestones(tmp_path):
    seen = []
    trained = training(
        tmp_path / "x", dataclasses.replace(RECIPE, schedule=Steps(milestones=(2, 4), gamma=0.2))
    )
    trained.fit(*data(), data(), lambda h: seen.append(trained.optimizer.param_groups[0]["lr"]))
    assert seen == pytest.approx([0.05, 0.05, 0.01, 0.01, 0.002, 0.002])


def test_a_diverged_student_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"not finite in epoch .*protocol\.optimization\.lr"):
        training(tmp_path / "x", dataclasses.replace(RECIPE, lr=1e30)).fit(
            *data(), data(), lambda h: None
        )


def test_a_student_learns_the_digits(tmp_path):
    dataset = Digits(8)
    rows = [(i.decode(), label) for label in range(10) for i in dataset.images("train", label)[:40]]
    pixels = torch.stack([student_pixels(i, 8) for i, _ in rows])
    labels = torch.tensor([label for _, label in rows])
    recipe = dataclasses.replace(
        RECIPE, epochs=25, schedule=Steps(milestones=(20,), gamma=0.2), batch_size=32, tests=(25,)
    )
    plain = Augmentation(
        crop_scale=(0.8, 1), crop_ratio=(1, 1), flip=0, jitter=0, lighting=0, cutmix=1
    )
    student = make_student("convnet2_w32", 10, 8, seed=0)
    trained = StudentTraining(student, recipe, HardTargets(plain), 0, tmp_path / "x")
    test = TestImages(dataset, tmp_path, 1).on(8, CPU)
    assert trained.fit(pixels, labels, test, lambda h: None).top1_last > 80


def test_test_images_are_cropped_from_the_shorter_side():
    wide = torch.zeros(3, 10, 30, dtype=torch.uint8)
    wide[:, :, 10:20] = 255  # the middle third
    out = student_pixels(to_pil(wide), 10)
    assert out.shape == (3, 10, 10)
    assert out[:, :, 2:8].min() > 250


def test_resizing_and_cropping_are_torchvisions():
    """Pixel for pixel, over many sides, also odd differences, enlarged images and wider margins."""
    draw = np.random.default_rng(0)
    mode = tv.InterpolationMode.BILINEAR
    for _ in range(300):
        width, height, size = (int(n) for n in draw.integers([1, 1, 1], [90, 90, 40]))
        resized = None if draw.random() < 0.5 else size + int(draw.integers(0, 9))
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        theirs = tv.center_crop(tv.resize(image, [resized or size], mode), [size, size])
        assert torch.equal(student_pixels(image, size, resized), tv.pil_to_tensor(theirs))


def test_images_that_do_not_fit_are_mapped_once_and_made_again_when_cut_short(tmp_path):
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(5)]
    shape, digests = (5, 3, 2, 2), list("abcde")

    def mapped(source):
        return held_or_mapped(source, shape, digests, CPU, tmp_path, "training", limit=0)

    held = held_or_mapped(iter(images), shape, digests, CPU, tmp_path, "training", limit=1000)
    assert not list(tmp_path.iterdir())
    assert torch.equal(mapped(iter(images)), held)
    (path,) = (tmp_path / "pixels").glob("*.uint8")
    assert torch.equal(mapped(iter(())), held)  # found: nothing is read again
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(mapped(iter(images)), held)
    assert not list((tmp_path / "pixels").glob(".*.tmp"))


def test_weights_multiply_each_images_loss(tmp_path):
    """Weight 0 takes an image's class out of what is learned; all ones are no weights."""

    def trained(weights):
        one = training(tmp_path / "none")
        one.objective = HardTargets(AUGMENTATION, weights)
        one.fit(*data(), data(), lambda h: None)
        return torch.cat([p.flatten() for p in one.student.parameters()])

    ones = torch.ones(len(data()[0]))
    assert torch.allclose(trained(None), trained(ones), atol=1e-6)
    assert not torch.allclose(trained(None), trained(ones * torch.arange(len(ones)) / 4), atol=1e-3)
    logits, target = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    rows = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    loss = _cross_entropy(logits, target, torch.tensor([0.5, 3.0]))
    assert loss.item() == pytest.approx((0.5 * rows[0] + 3 * rows[1]).item() / 2)


def test_tests_do_not_depend_on_how_many_images_are_seen_at_once(monkeypatch):
    net, (pixels, _) = make_student("convnet2_w8", 4, 8, seed=0).eval(), data(50)
    expected, sizes = predicted(net, pixels), []

    def little_memory(images):
        sizes.append(len(images))
        if len(images) > 16:
            raise torch.OutOfMemoryError
        return net(images)

    assert torch.equal(predicted(little_memory, pixels), expected)
    assert sizes == [50, 25, 12, 12, 12, 12, 2]
    monkeypatch.setattr(eval.protocols.training, "_TEST_BATCH", 7)
    assert torch.equal(predicted(net, pixels), expected)


@pytest.mark.parametrize(
    ("free", "side", "size"), [(80, 256, 64), (80, 64, 1024), (80, 8, 1024), (2, 256, 16)]
)
def test_a_test_leaves_the_gpu_to_others(monkeypatch, free, side, size):
    monkeypatch.setattr(eval.protocols.training, "free_bytes", lambda device: free << 30)
    pixels = SimpleNamespace(device=torch.device("cuda"), shape=(500, 3, side, side))
    assert eval.protocols.training._test_batches(pixels).size == size


def test_a_batch_draws_from_its_stream_in_this_order():
    """Boxes, flips, jitter, lighting, then CutMix: finished runs were trained so."""
    plan = HardTargets(AUGMENTATION).plan(4, (8, 8), torch.Generator().manual_seed(5))
    assert plan.draws.boxes.tolist() == [[0, 0, 7, 8], [2, 0, 6, 7], [0, 0, 8, 7], [1, 0, 7, 8]]
    assert plan.draws.order.tolist() == [[1, 0, 2], [0, 1, 2], [0, 2, 1], [0, 1, 2]]
    assert plan.draws.strengths[0].tolist() == pytest.approx(
        [-0.099436, 0.209236, 0.178397], abs=1e-5
    )
    assert plan.draws.lighting.flatten()[:3].tolist() == pytest.approx(
        [-0.001109, -0.001874, -0.001775], abs=1e-5
    )
    assert plan.mix.permutation.tolist() == [1, 0, 3, 2] and plan.mix.box == (2, 6, 2, 6)


class Watched(nn.Module):
    """A student that notes how float32 is computed, forwards and backwards."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 4), set()

    def note(self, *_):
        now = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        self.seen.add((*now, torch.is_grad_enabled()))

    def forward(self, x):
        self.note()
        out = self.layer(x.mean(dim=(2, 3)))
        if out.requires_grad:
            out.register_hook(self.note)
        return out


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_float32_is_float32_in_trainings_tests_answers_and_measures(tmp_path, precision):
    """PyTorch's convolutions take TF32 units of a GPU unless told otherwise."""
    tf32 = ("high", True) if precision == "tf32" else ("highest", False)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    net, recipe = Watched(), dataclasses.replace(RECIPE, precision=precision)
    StudentTraining(net, recipe, HardTargets(AUGMENTATION), 0, tmp_path / "x").fit(
        *data(), data(), lambda h: None
    )
    teacher = Watched()
    Answers(teacher, precision)(torch.rand(2, 3, 8, 8))
    for seen in (net.seen, teacher.seen):
        assert {(matmul, conv) for matmul, conv, _ in seen} == {tf32}
    measured = Watched()
    features_and_logits(measured, torch.rand(2, 3, 8, 8))
    assert measured.seen == {("highest", False, False)}
    after = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert after == before == ("highest", True)

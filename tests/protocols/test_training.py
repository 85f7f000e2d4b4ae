"""Training: interrupted anywhere it ends in the same weights, and its tests count what they say."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import eval.protocols.training
from eval.images import TestImages, student_pixels
from eval.metrics.features import features_and_logits
from eval.protocols.answers import Answers
from eval.protocols.augmentation import Augmentation
from eval.protocols.hard_label import HardTargets, _cross_entropy
from eval.protocols.recipe import Recipe, Steps
from eval.protocols.training import StudentTraining, predicted
from eval.students.registry import make_student
from mgd3.data.digits import Digits
from mgd3.runtime.errors import UserError

RECIPE = Recipe(
    epochs=6, batch_size=8, optimizer="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, decay="all",
    schedule=Steps(milestones=(4, 5), gamma=0.2), tests=(2, 4, 6), precision="float32",
)  # fmt: skip


AUGMENTATION = Augmentation(
    crop_scale=(0.5, 1.0), crop_ratio=(0.75, 4 / 3), flip=0.5, jitter=0.4, lighting=0.1, cutmix=1.0
)


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
    test = TestImages(dataset, tmp_path, 1).on(8, torch.device("cpu"))
    assert trained.fit(pixels, labels, test, lambda h: None).top1_last > 80


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

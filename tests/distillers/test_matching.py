"""Distribution matching where its optimum is known, and its augmentation by hand."""

import pytest
import torch
from support import composed

from eval.metrics.features import RandomStudents
from eval.protocols.augmentation import normalise
from mgd3.config.build import build_distiller
from mgd3.data.digits import Digits
from mgd3.distillers.matching import DistributionMatching
from mgd3.distillers.siamese_augmentation import SiameseAugmentation
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream


class Identity:
    """Embeds by looking: the optimum is the real images' mean, pixel by pixel."""

    device = torch.device("cpu")

    def network(self, seed, num_classes):
        return lambda images: images.flatten(1)


def matching(tmp_path, kind=DistributionMatching, **options):
    work = Work(cache=tmp_path / "cache", batch_size=8, workers=1, flip="none")
    defaults = {
        "iterations": 60, "lr": 0.3, "momentum": 0.5, "real_batch": 50, "augmentations": [],
        "checkpoint_iterations": 20,
    }  # fmt: skip
    return kind(Identity(), work, **defaults | options)


def real_images():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(50, 3, 4, 4, generator=draw) + c for c in range(2)]


def test_means_are_matched(tmp_path):
    real = real_images()
    made = matching(tmp_path)._match(real, 3, 0, tmp_path / "state")
    assert made.shape == (2, 3, 3, 4, 4)
    for images, ours in zip(real, made, strict=True):
        assert (ours.mean(dim=0) - images.mean(dim=0)).abs().max() < 1e-3
        assert ours.std(dim=0).mean() > 0.5  # three images, not their mean three times


def test_it_begins_with_real_images(tmp_path):
    real = real_images()
    made = matching(tmp_path, lr=0.0)._match(real, 3, 0, tmp_path / "state")
    for images, ours in zip(real, made, strict=True):
        assert all((images == one).flatten(1).all(dim=1).any() for one in ours)


class Dying(DistributionMatching):
    def _loss(self, real, made, seed, iteration):
        if iteration == 35:
            raise KeyboardInterrupt
        return super()._loss(real, made, seed, iteration)


def test_an_interrupted_matching_ends_as_an_uninterrupted_one(tmp_path):
    whole = matching(tmp_path, augmentations=["color", "crop"])
    expected = whole._match(real_images(), 2, 0, tmp_path / "whole")
    dying = matching(tmp_path, kind=Dying, augmentations=["color", "crop"])
    with pytest.raises(KeyboardInterrupt):
        dying._match(real_images(), 2, 0, tmp_path / "cut")
    assert torch.equal(whole._match(real_images(), 2, 0, tmp_path / "cut"), expected)


def test_a_diverging_matching_is_named(tmp_path):
    with pytest.raises(UserError, match=r"matching loss is .*lower method\.lr"):
        matching(tmp_path, lr=1e30)._match(real_images(), 2, 0, tmp_path / "state")


def test_a_run_writes_images_of_the_students_size(tmp_path):
    cfg = composed(
        "method=dm", "method.iterations=3", "features.student=convnet2_w8", "compute.device=cpu",
        f"cache={tmp_path / 'cache'}",
    )  # fmt: skip
    out = build_distiller(cfg).distill(
        Digits(8), 2, 0, tmp_path / "out", {"method": "dm", "config": {}}
    )
    pictures = list(out.images())
    assert len(pictures) == 20 and {image.size for image, _ in pictures} == {(8, 8)}
    assert not (tmp_path / "out/matching.safetensors").exists()


def test_pixels_survive_the_networks_normalisation():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    students = RandomStudents("convnet2_w8", 8, torch.device("cpu"), 1)
    assert torch.equal(students.pixels(normalise(pixels / 255)), pixels)
    embed, again, other = (students.network(seed, 10) for seed in (1, 1, 2))
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    assert torch.equal(embed(x), again(x)) and not torch.equal(embed(x), other(x))
    embed(x).sum().backward()
    assert x.grad.abs().sum() > 0


def test_dropout_is_the_seeds_and_another_for_each_call():
    students = RandomStudents("vit_glad_p4", 8, torch.device("cpu"), 1)
    x = torch.randn(2, 3, 8, 8)
    first, again = (students.network(5, 10) for _ in range(2))
    one, two = first(x), first(x)
    torch.rand(3)  # what others draw
    assert torch.equal(again(x), one) and torch.equal(again(x), two) and not torch.equal(one, two)


def operation(name, seed=0):
    return SiameseAugmentation([name]).draw(stream("dsa", seed))


@pytest.mark.parametrize("name", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_an_operation_is_the_same_for_every_image_and_batch(name):
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    apply = operation(name, seed=3)
    together = apply(x)
    assert together.shape == x.shape
    assert torch.allclose(torch.cat([apply(x[:1]), apply(x[1:])]), together, atol=1e-6)
    together.square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


def test_operations_by_hand():
    x = torch.rand(1, 3, 16, 16) + 1
    assert any(torch.equal(operation("flip", s)(x), x.flip(-1)) for s in range(8))
    for seed in range(8):
        cut = operation("cutout", seed)(x)
        zeros = int((cut == 0).all(dim=1).sum())
        assert 16 <= zeros <= 64 and torch.equal(cut[cut != 0], x[cut != 0])
        shifted = operation("crop", seed)(x)
        assert any(
            torch.equal(
                shifted, torch.nn.functional.pad(x, (2, 2, 2, 2))[..., a : a + 16, b : b + 16]
            )
            for a in range(5)
            for b in range(5)
        )
        grey = torch.full((1, 3, 4, 4), 0.25)
        moved = operation("color", seed)(grey)
        assert moved.std() < 1e-6 and abs(moved.mean().item() - 0.25) <= 0.5
        constant = torch.ones(1, 1, 9, 9)
        for name in ("scale", "rotate"):
            assert operation(name, seed)(constant)[0, 0, 4, 4] == pytest.approx(1.0)
    with pytest.raises(UserError, match=r"method\.augmentations='blur'"):
        SiameseAugmentation(["blur"])

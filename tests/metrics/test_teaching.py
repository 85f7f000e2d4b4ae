"""A small student learns from samples that show the classes, not from noise."""

import pytest
import torch
from support import composed

from eval.metrics.teaching import lesson
from mgd3.config.build import build_protocol
from mgd3.data.digits import Digits
from mgd3.data.inventory import take_inventory
from mgd3.data.pixels import from_pil

CPU = torch.device("cpu")


@pytest.fixture
def images(tmp_path):
    """Training and test images of two digits, by class."""
    dataset = Digits(8, classes=[0, 1])
    found = (take_inventory(dataset, split, 1, tmp_path, 1) for split in ("train", "val"))
    return [[list(of_class.images) for of_class in split] for split in found]


def taught(samples, train, val):
    protocol = build_protocol(composed("protocol=hard_label_short", "protocol.epochs=15"))
    return lesson(samples, train, val, protocol, "convnet2_w8", CPU)


def pixels(images, count):
    return torch.stack([torch.stack([from_pil(i.decode()) for i in of[:count]]) for of in images])


def test_real_images_as_samples_teach_the_classes_and_noise_does_not(images):
    train, val = images
    real = taught(pixels(train, 8), train, val)
    assert (real.per_class, real.chance) == (8, 50) and real.samples > 80 and real.real > 80
    noise = torch.randint(256, (2, 8, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    found = taught(noise.to(torch.uint8), train, val)
    assert found.worse and found.real == real.real  # the same draw of real images
    assert found.sentence().endswith("samples teach less than random real images, train longer")


def test_small_classes_are_taught_by_as_many_samples(images):
    train, val = images
    few = [train[0][:3], train[1]]
    assert taught(pixels(train, 8), few, val).per_class == 3

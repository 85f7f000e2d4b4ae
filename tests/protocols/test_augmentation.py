"""The batched transforms against torchvision's, image by image, and against their formulas."""

import pytest
import torch
from torchvision.transforms import functional as tv

from eval.protocols.augmentation import (
    MEAN,
    STD,
    Augmentation,
    SoftAugmentation,
    color_jitter,
    crop_boxes,
    draw_jitter,
    lighting_shift,
    normalise,
    resized_crop,
)
from eval.protocols.mixing import draw_mix


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=6, size=(20, 24)):
    return torch.rand(count, 3, *size, generator=draw(9))


def augmented(augmentation, pixels, seed=0):
    return augmentation.apply(pixels, augmentation.draw(len(pixels), pixels.shape[2:], draw(seed)))


def test_resized_crop_is_torchvisions():
    x = images()
    boxes = crop_boxes(len(x), (20, 24), (0.3, 1.0), (0.75, 4 / 3), draw())
    flips = torch.tensor([False, True] * 3)
    out = resized_crop(x, boxes, flips)
    for row, (top, left, height, width) in enumerate(boxes.tolist()):
        expected = tv.resized_crop(x[row], top, left, height, width, [20, 24], antialias=False)
        expected = expected.flip(-1) if flips[row] else expected
        assert (out[row] - expected).abs().max() < 1e-5


def test_crop_boxes_have_the_asked_area_and_ratio():
    boxes = crop_boxes(4000, (224, 224), (0.5, 1.0), (0.75, 4 / 3), draw())
    top, left, height, width = boxes.double().unbind(1)
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + height <= 224).all() and (left + width <= 224).all()
    area, ratio = height * width / 224**2, width / height
    assert area.min() > 0.49 and area.max() <= 1.0
    assert ratio.min() > 0.74 and ratio.max() < 1.36
    assert 0.65 < area.mean() < 0.75


def test_an_impossible_crop_keeps_the_whole_image():
    assert crop_boxes(3, (8, 8), (2.0, 3.0), (1.0, 1.0), draw()).tolist() == [[0, 0, 8, 8]] * 3


def test_jitter_of_strength_zero_changes_nothing():
    assert torch.equal(color_jitter(images(), *draw_jitter(6, 0.0, draw())), images())


def test_jitter_moves_along_the_three_targets():
    """Grey stays grey under saturation; black stays black under brightness; nothing is clamped."""
    grey = torch.full((64, 3, 4, 4), 0.5)
    out = color_jitter(grey, *draw_jitter(64, 0.4, draw()))
    assert torch.allclose(out[:, 0], out[:, 1]) and torch.allclose(out[:, 1], out[:, 2])
    factor = out[:, 0, 0, 0] / 0.5  # only brightness moves a flat grey image
    assert factor.min() >= 0.6 - 1e-6 and factor.max() <= 1.4 + 1e-6
    assert factor.max() - factor.min() > 0.5
    assert color_jitter(torch.ones(64, 3, 4, 4), *draw_jitter(64, 0.4, draw())).max() > 1.05


def test_lighting_follows_imagenets_covariance():
    shift = lighting_shift(20000, 0.1, draw())[:, :, 0, 0].double()
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    ).double()
    values = torch.tensor([0.2175, 0.0188, 0.0045]).double()
    expected = 0.01 * vectors @ torch.diag(values**2) @ vectors.T
    assert torch.allclose(shift.T @ shift / len(shift), expected, atol=3e-6)


def test_normalisation_is_last():
    plain = Augmentation(
        crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0, jitter=0.0, lighting=0.0, cutmix=0.0
    )
    pixels = torch.randint(0, 256, (2, 3, 8, 8), generator=draw(), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.allclose(augmented(plain, pixels), (pixels / 255 - mean) / std, atol=1e-5)
    assert normalise(mean.expand(1, 3, 2, 2)).abs().max() == 0


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_counts_the_pixels_it_mixed(seed):
    x = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 16, 12)
    permutation, _, share = mix = draw_mix(1.0, 5, (16, 12), draw(seed))
    mixed = mix.of(x)
    pasted = mixed != x
    for row in range(5):
        if permutation[row] == row:
            continue
        assert (mixed[row][pasted[row]] == permutation[row]).all()
        assert pasted[row, 0].float().mean() == pytest.approx(1 - share)
    assert torch.equal(permutation.sort().values, torch.arange(5))


def test_augmentation_depends_on_its_generator_alone():
    augmentation = Augmentation(
        crop_scale=(0.5, 1.0),
        crop_ratio=(0.75, 4 / 3),
        flip=0.5,
        jitter=0.4,
        lighting=0.1,
        cutmix=1.0,
    )
    pixels = torch.randint(0, 256, (4, 3, 8, 8), generator=draw(), dtype=torch.uint8)
    assert torch.equal(augmented(augmentation, pixels, 1), augmented(augmentation, pixels, 1))
    assert not torch.equal(augmented(augmentation, pixels, 1), augmented(augmentation, pixels, 2))


OFF = {
    "crop_scale": (1, 1), "crop_ratio": (1.0, 1.0), "flip": 0, "jitter": 0.0, "lighting": 0.0,
    "cutmix": 0.0,
}  # fmt: skip
SOFT_OFF = {"size": 8, "patches": 1, "crop_scale": (1.0, 1.0), "flip": 0.0, "cutmix": 0}


@pytest.mark.parametrize(("kind", "off"), [(Augmentation, OFF), (SoftAugmentation, SOFT_OFF)])
def test_every_switch_alone_augments(kind, off):
    assert not kind(**off).changes
    on = {"crop_scale": (0.5, 1), "crop_ratio": (0.75, 1), "patches": 2}
    for switch in off.keys() - {"size"}:
        assert kind(**off | {switch: on.get(switch, 0.1)}).changes, switch


def test_an_augmentation_that_is_off_only_normalises():
    """So that «augmented» says what students see: also whole crops of a square of any ratio."""
    pixels = torch.randint(0, 256, (64, 3, 8, 8), generator=draw(), dtype=torch.uint8)
    for off in (Augmentation(**OFF), SoftAugmentation(**SOFT_OFF)):
        assert torch.allclose(augmented(off, pixels), normalise(pixels / 255), atol=1e-5)

"""RDED's images: ranks and their places, an observer's choice, streams, what is refused."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import image, run
from PIL import Image
from support import composed
from torch import nn

from eval.metrics.features import StudentExtractor
from mgd3.config.build import build_distiller
from mgd3.data.digits import ArrayImage, Digits
from mgd3.data.inventory import ClassImages
from mgd3.data.pixels import from_pil
from mgd3.distillers.tiled_crops import Draws, TiledCrops, square
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError

PROVENANCE = {"method": "rded", "config": {}, "identity": {}, "data": {"train": None}}


class Brightness:
    """An observer to whom a bright first pixel is class 1, a dark one class 0."""

    image_size, device = 8, torch.device("cpu")

    def __init__(self):
        self.fits = 0

    def fit(self, dataset, inventory):
        self.fits += 1
        return self

    def stages(self, dataset, inventory):
        return []

    def observe(self, crops):
        first = crops[:, 0, 0, 0]
        return torch.stack([-first, first], dim=1)


def distiller(tmp_path, workers=1, **options):
    work = Work(cache=tmp_path / "cache", batch_size=4, workers=workers, flip="none")
    usual = {"mipc": 300, "num_crop": 5, "factor": 2, "crop_scale": [0.08, 1]}
    values = usual | {"rounding": "nearest", "jpeg_quality": None} | options
    return TiledCrops(Brightness(), work, **values)


def real(count, side=8, label=1):
    """Images of one grey each, the k-th one k, and who they are."""
    pixels = [np.full((side, side), k, dtype=np.uint8) for k in range(count)]
    return ClassImages(
        tuple(ArrayImage(f"train/{label}/{k:03d}", p) for k, p in enumerate(pixels)),
        ("",) * count,
    )


def files(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")}


def test_place_q_of_image_i_is_rank_q_ipc_plus_i(tmp_path):
    one, ipc = distiller(tmp_path), 3
    draws = Draws(0, "1", lambda n: None)
    images = draws.some(real(40).images, 40)
    assert sorted(i.key for i in images) == [i.key for i in real(40).images]
    best = one.kept(Brightness(), images, 1, draws).best(ipc * 4)
    values = (best.pixels[:, 0, 0, 0] * 255).round()
    assert values.tolist() == [39.0 - rank for rank in range(12)]  # no real image twice
    assert torch.all(best.losses[1:] >= best.losses[:-1])
    for i, made in enumerate((one.tiled(best.pixels, 8) * 255).round()):
        quarters = [made[0, top, left] for top in (0, 4) for left in (0, 4)]
        assert quarters == [39.0 - (q * ipc + i) for q in range(4)]


def test_of_each_image_the_crop_of_least_loss_is_kept(tmp_path):
    """Of eight crops of a ramp the one whose first pixel is brightest, by the image's own draws."""
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    found = [ArrayImage("train/1/a", ramp)]
    draws, one = Draws(3, "1", lambda n: None), distiller(tmp_path, num_crop=8, factor=1)
    draw = draws.of(found[0])
    lefts = [square((32, 32), (0.08, 1), draw) for _ in range(8)]
    brightest = max(lefts, key=lambda box: box[1] + box[2] / 16)
    kept = one.kept(Brightness(), found, 1, draws).pixels[0, 0, 0, 0] * 255
    assert abs(kept.item() - 8 * brightest[1]) < 8 * brightest[2] / 8
    darkest = one.kept(Brightness(), found, 0, draws).pixels[0, 0, 0, 0] * 255
    assert darkest < kept


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_crops_fill_the_image_without_a_seam_of_another_colour(tmp_path, factor):
    one = distiller(tmp_path, factor=factor)
    crops = (
        torch.arange(2 * factor**2)
        .float()
        .view(-1, 1, 1, 1)
        .expand(-1, 3, 8 // factor, 8 // factor)
    )
    images = one.tiled(crops / 255, 8) * 255
    assert images.shape == (2, 3, 8, 8)
    for i, made in enumerate(images.round()):
        assert made[0].unique().tolist() == [q * 2.0 + i for q in range(factor**2)]
    if factor == 1:
        whole = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert torch.equal(one.tiled(whole, 8), whole)
    if factor == 3:  # 8 = 3 + 3 + 2
        assert (images[0, 0].round() == 0).sum() == 9 and (images[0, 0].round() == 16).sum() == 4


def test_squares_are_torchvisions():
    """The same rule: side round(sqrt(area share)), inside the image, else the middle's largest."""
    draw = torch.Generator().manual_seed(0)
    boxes = [square((20, 50), (0.08, 1), draw) for _ in range(300)]
    sides = [side for _, _, side in boxes]
    assert min(sides) >= 8 and max(sides) <= 20
    assert all(0 <= t <= 20 - s and 0 <= left <= 50 - s for t, left, s in boxes)
    assert square((20, 50), (1.0, 1.0), draw) == (0, 15, 20)  # 31.6 never fits


@pytest.mark.parametrize(("mipc", "seen"), [(5, 12), (20, 20), (300, 40)])
def test_so_many_images_are_looked_at(tmp_path, mipc, seen):
    """As `mipc` says; all where there are fewer, and as many as crops are needed."""
    one, keys = distiller(tmp_path, mipc=mipc), []
    kept = one.kept
    one.kept = lambda observer, images, *rest: (
        keys.append(len(images)),
        kept(observer, images, *rest),
    )[1]
    dataset = Digits(8, classes=["0", "1"])
    dataset.images = lambda split, label: real(40, label=label).images
    (stage,) = one.stages(dataset, 3, tmp_path, [real(40), real(40)])
    one.distill(dataset, 3, 0, tmp_path / "out", PROVENANCE)
    assert keys == [seen, seen] and f"of {2 * seen} real images" in stage.what


def test_neither_workers_nor_a_kill_change_a_byte(tmp_path):
    dataset = Digits(8, classes=["0", "1"])
    made = []
    for workers in (1, 4):
        out = tmp_path / str(workers)
        distiller(tmp_path, workers).distill(dataset, 3, 0, out, PROVENANCE)
        made.append(files(out))
    assert made[0] == made[1] and len(made[0]) == 6
    other = tmp_path / "other"
    distiller(tmp_path).distill(dataset, 3, 1, other, PROVENANCE)
    assert files(other) != made[0]
    stopped, one = tmp_path / "stopped", distiller(tmp_path)
    picture, calls = one.picture, []

    def killed(pixels):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return picture(pixels)

    one.picture = killed
    with pytest.raises(KeyboardInterrupt):
        one.distill(dataset, 3, 0, stopped, PROVENANCE)
    assert len(files(stopped)) == 4
    again = distiller(tmp_path)
    again.distill(dataset, 3, 0, stopped, PROVENANCE)
    assert files(stopped) == made[0]
    again.distill(dataset, 3, 0, stopped, PROVENANCE)
    assert again.features.fits == 1, "a finished set asks no observer"


def test_rounding_and_jpeg_are_what_the_release_does(tmp_path):
    grey = torch.full((3, 8, 8), 100.7 / 255)
    assert from_pil(distiller(tmp_path).picture(grey)).unique().tolist() == [101]
    cut = distiller(tmp_path, rounding="truncate").picture(grey)
    assert from_pil(cut).unique().tolist() == [100]
    photo = image(size=(16, 16))
    file = io.BytesIO()
    photo.save(file, "JPEG", quality=75)
    expected = from_pil(Image.open(file).convert("RGB"))
    made = distiller(tmp_path, jpeg_quality=75).picture(from_pil(photo) / 255)
    assert torch.equal(from_pil(made), expected)
    assert not torch.equal(expected, from_pil(photo))


def test_an_observer_sees_small_crops_amid_the_mean_colour():
    seen = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(3 * 64, 2)

        def forward(self, images):
            seen.append(images)
            return self.last(images.flatten(1))

    extract = StudentExtractor(Watch(), 8, torch.device("cpu"), 1, [])
    assert extract.observe(torch.ones(2, 3, 3, 4)).shape == (2, 2)
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:5, 2:6] = True
    assert torch.all(seen[0][:, :, ~inside] == 0) and torch.all(seen[0][:, :, inside] > 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mipc": 0}, r"method\.mipc"),
        ({"factor": 6}, r"class 8 .* has 104 .* fewer than the 108 needed; ipc=2 is the largest"),
        ({"factor": 9}, r"method\.factor=9 is not allowed|method\.factor"),
        ({"crop_scale": [1, 0.5]}, r"method\.crop_scale=\[1, 0\.5\] must be \[low, high\]"),
        ({"rounding": "up"}, r"method\.rounding='up'"),
        ({"jpeg_quality": 0}, r"method\.jpeg_quality"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        distiller(tmp_path, **options).distill(Digits(8), 3, 0, tmp_path / "out", PROVENANCE)
    assert not (tmp_path / "out/images").exists()


@pytest.mark.parametrize("features", ["none", "random_students"])
def test_an_observer_must_know_the_classes(features):
    with pytest.raises(UserError, match="add features=observer"):
        build_distiller(composed("method=rded", f"features={features}"))


FEW = (
    "method=rded", "tracker=none", "report=false", "students=[]", "compute.device=cpu",
    "features.student=convnet2_w8", "dataset.classes=[0,1]",
)  # fmt: skip


def test_a_run_tiles_real_images_and_a_weak_observer_is_refused(tmp_path):
    done = run(tmp_path, *FEW, "ipc=2", "features.epochs=6")
    assert done.returncode == 0, done.stderr[-1500:]
    (manifest,) = tmp_path.rglob("manifest.json")
    told = json.loads(manifest.read_text())
    assert len(told["images"]) == 4 and told["identity"]["features"]["choice"] == "observer"
    weak = run(tmp_path, *FEW, "ipc=2", "features.epochs=6", "features.minimum_top1=100.1")
    assert weak.returncode == 1 and "Traceback" not in weak.stderr
    assert "features: convnet2_w8 (trained here) is right on" in weak.stderr
    assert "less than features.minimum_top1=100.1 (chance is 50 %)" in weak.stderr
    many = run(tmp_path, *FEW, "ipc=30")
    assert "ipc=26 is the largest possible here" in many.stderr

"""Decoded pixels in files: read once per machine, of these images alone, and not without end."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv

from eval import pixel_files
from eval.images import TestImages, student_pixels, training_images
from eval.pixel_files import held_or_mapped
from mgd3.data.datasets import ImageTree
from mgd3.data.digits import Digits
from mgd3.data.distilled import DistilledDataset, DistilledWriter
from mgd3.data.pixels import to_pil
from mgd3.runtime.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def kept(monkeypatch):
    """Every set is worth a file."""
    monkeypatch.setattr(pixel_files, "LEAST", 0)


def pixels_of(tree, cache, size=8, resized=None):
    return TestImages(ImageTree("t", None, str(tree), 16), cache, 2).on(size, CPU, resized)


def files(cache):
    return sorted((cache / "pixels").glob("*.uint8"))


def test_small_sets_are_decoded_and_leave_no_file(tmp_path):
    TestImages(Digits(8), tmp_path, 1).on(8, CPU)
    assert not (tmp_path / "pixels").exists()


def test_test_images_are_decoded_once(tree, tmp_path, kept, monkeypatch):
    first = pixels_of(tree, tmp_path)
    (file,) = files(tmp_path)
    assert file.stat().st_size == first[0].numel() + 4
    decoded = []
    monkeypatch.setattr("eval.images.student_pixels", lambda *args: decoded.append(args))
    again = pixels_of(tree, tmp_path)
    assert not decoded and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("harm", ["cut short", "a byte", "grown"])
def test_a_damaged_file_is_made_again(tree, tmp_path, kept, harm):
    pixels = pixels_of(tree, tmp_path)[0].clone()  # not the file, which is harmed below
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    harmed = {
        "cut short": whole[:-1], "a byte": bytes([whole[0] ^ 1]) + whole[1:], "grown": whole + b"x"
    }  # fmt: skip
    file.write_bytes(harmed[harm])
    assert torch.equal(pixels_of(tree, tmp_path)[0], pixels)
    assert file.read_bytes() == whole


def test_other_photographs_sizes_and_margins_have_files_of_their_own(tree, tmp_path, kept):
    before, _ = pixels_of(tree, tmp_path)
    assert not torch.equal(pixels_of(tree, tmp_path, 8, 10)[0], before)
    pixels_of(tree, tmp_path, 9)
    assert len(files(tmp_path)) == 3
    photograph = next((tree / "val").rglob("*.*"))
    with Image.open(photograph) as image:
        Image.new("RGB", image.size, (1, 200, 3)).save(photograph)
    os.utime(photograph, (1, 1))
    assert not torch.equal(pixels_of(tree, tmp_path)[0], before)
    assert len(files(tmp_path)) == 4


def test_a_full_folder_and_one_that_cannot_be_written_are_done_without(
    tree, tmp_path, kept, monkeypatch, caplog
):
    monkeypatch.setattr(pixel_files, "MOST", 100)
    with caplog.at_level("INFO"):
        pixels, _ = pixels_of(tree, tmp_path)
    assert not files(tmp_path) and "no room: delete old ones" in caplog.text
    monkeypatch.setattr(pixel_files, "MOST", 2**30)
    monkeypatch.setattr(pixel_files.os, "access", lambda *_: False)  # as root can write anywhere
    assert torch.equal(pixels_of(tree, tmp_path)[0], pixels)
    assert not files(tmp_path)


def test_a_set_whose_image_was_changed_is_refused_although_its_pixels_are_kept(
    tree, tmp_path, kept
):
    writer = DistilledWriter(tmp_path / "set", ImageTree("t", None, str(tree), 16), ipc=1, seed=0)
    for wnid in ("cat", "dog"):
        writer.write_image(wnid, 0, Image.new("RGB", (9, 9), (5, 7, 9)))
    writer.finish({"method": "m", "config": {}}, {})
    distilled = DistilledDataset(tmp_path / "set")
    pixels, _ = training_images(distilled, 8, CPU, tmp_path, 2)
    assert len(files(tmp_path)) == 1
    assert torch.equal(training_images(distilled, 8, CPU, tmp_path, 2)[0], pixels)
    Image.new("RGB", (9, 9)).save(tmp_path / "set/images/dog/00000.png")
    with pytest.raises(UserError, match=r"dog/00000\.png"):
        training_images(distilled, 8, CPU, tmp_path, 2)


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
    again = mapped(iter(()))  # found: nothing is read again
    assert torch.equal(again, held)
    # a shared cache that one may only read will do: the pages are mapped for reading alone
    if sys.platform.startswith("linux"):
        maps = Path("/proc/self/maps").read_text().splitlines()
        assert {line.split()[1] for line in maps if str(path) in line} == {"r--s"}
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(mapped(iter(images)), held)
    assert not list((tmp_path / "pixels").glob(".*.tmp"))

"""Class lists, folder layouts, file formats, and what is wrong with them said plainly."""

import shutil

import numpy as np
import pytest
from conftest import image
from PIL import Image

from mgd3.data.class_lists import read_class_list
from mgd3.data.datasets import ImageFile, ImageTree
from mgd3.data.digits import Digits
from mgd3.data.inventory import take_inventory
from mgd3.data.pixels import center_crop
from mgd3.runtime.errors import UserError


def tree_of(folder, **options):
    return ImageTree(
        **{"name": "t", "class_list": None, "root": str(folder), "student_size": 16} | options
    )


@pytest.mark.parametrize(
    ("name", "indices"),
    [
        ("imagenette", [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]),
        ("imagewoof", [193, 182, 258, 162, 155, 167, 159, 273, 207, 229]),
        ("imageidc", [452, 64, 374, 236, 993, 176, 882, 904, 503, 74]),
        ("imagenet_a", [255, 376, 984, 364, 500, 986, 333, 576, 148, 135]),
        ("imagenet_b", [129, 916, 90, 275, 995, 874, 102, 259, 685, 139]),
        ("imagenet_c", [565, 94, 554, 535, 92, 392, 291, 136, 324, 11]),
        ("imagenet_d", [9, 258, 13, 262, 19, 339, 321, 24, 93, 322]),
        ("imagenet_e", [816, 96, 100, 145, 739, 713, 783, 76, 688, 326]),
    ],
)
def test_class_lists_keep_the_benchmark_order(name, indices):
    assert [c.imagenet_id for c in read_class_list(name)] == indices


def test_larger_class_lists():
    thousand = read_class_list("imagenet1k")
    assert [c.imagenet_id for c in thousand] == list(range(1000))
    assert [c.wnid for c in thousand] == sorted(c.wnid for c in thousand)
    hundred = read_class_list("imagenet100")
    assert len({c.wnid for c in hundred}) == 100
    assert hundred[:10] == read_class_list("imageidc")
    assert all(thousand[c.imagenet_id].wnid == c.wnid for c in hundred)


def test_digits_are_split_once_and_for_all():
    first, again = Digits(8), Digits(8)
    keys = {s: [[i.key for i in first.images(s, c)] for c in range(10)] for s in ("train", "val")}
    assert sum(map(len, keys["train"])) == 1078
    assert sum(map(len, keys["val"])) == 719
    assert keys["val"][3] == [i.key for i in again.images("val", 3)]
    seen = {k.rsplit("/", 1)[1] for split in keys.values() for label in split for k in label}
    assert len(seen) == 1797  # no digit is in both splits


def test_labels_do_not_depend_on_what_else_lies_on_disk(tmp_path):
    wnids = [c.wnid for c in read_class_list("imagewoof")]
    for wnid in [*reversed(wnids), "n01440764", "zebra"]:
        for split in ("train", "validation"):
            (tmp_path / split / wnid).mkdir(parents=True)
            image().save(tmp_path / split / wnid / f"{wnid}_x.png")
    (tmp_path / "train" / "notes.txt").touch()
    dataset = tree_of(tmp_path, class_list="imagewoof")
    assert [c.wnid for c in dataset.classes] == wnids
    assert [dataset.images("val", k)[0].key for k in range(10)] == [
        f"val/{w}/{w}_x.png" for w in wnids
    ]


@pytest.mark.parametrize("mixed", ["train/{0}/ILSVRC2012_val_00000001.png", "val/{0}/{0}_7.png"])
def test_fastai_resplit_is_recognised(tmp_path, mixed):
    wnids = [c.wnid for c in read_class_list("imagenette")]
    for wnid in wnids:
        for split, name in (("train", f"{wnid}_1.png"), ("val", "ILSVRC2012_val_00000002.png")):
            (tmp_path / split / wnid).mkdir(parents=True)
            image().save(tmp_path / split / wnid / name)
    assert tree_of(tmp_path, class_list="imagenette").note is None
    image().save(tmp_path / mixed.format(wnids[3]))
    assert "fast.ai" in tree_of(tmp_path, class_list="imagenette").note


def test_every_kind_of_file_becomes_upright_rgb(tmp_path):
    red = Image.new("RGB", (8, 4), (200, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    transparent = Image.new("RGBA", (8, 4), (0, 0, 0, 0))
    palette = red.quantize(4)
    deep = Image.fromarray(np.full((4, 8), 0x8000, dtype=np.uint16))
    files = {
        "grey.jpg": (red.convert("L"), {}, (8, 4), None),
        "palette.png": (palette, {}, (8, 4), (200, 10, 20)),
        "cmyk.jpg": (red.convert("CMYK"), {"quality": 95}, (8, 4), (200, 10, 20)),
        "alpha.png": (transparent, {}, (8, 4), (255, 255, 255)),
        "webp.webp": (red, {"lossless": True}, (8, 4), (200, 10, 20)),
        "turned.JPEG": (
            red,
            {"exif": exif, "quality": 95, "format": "JPEG"},
            (4, 8),
            (200, 10, 20),
        ),
        "deep.png": (deep, {}, (8, 4), (128, 128, 128)),
    }
    for name, (picture, options, size, colour) in files.items():
        picture.save(tmp_path / name, **options)
        decoded = ImageFile(name, tmp_path / name).decode()
        assert (decoded.mode, decoded.size) == ("RGB", size), name
        if colour:
            got = np.array(decoded).reshape(-1, 3).mean(axis=0)
            assert np.abs(got - colour).max() < 12, name


def test_center_crop_halves_then_scales():
    assert center_crop(image(size=(600, 130)), 64).size == (64, 64)
    assert center_crop(image(size=(20, 16)), 64).size == (64, 64)
    same = image(size=(32, 32))
    assert center_crop(same, 32).tobytes() == same.tobytes()


def test_a_broken_file_is_named_and_counted(tree, tmp_path):
    dataset, cache = tree_of(tree), tmp_path / "cache"
    assert [len(c.images) for c in take_inventory(dataset, "train", 1, cache, 2)] == [4, 4]
    whole = (tree / "train/dog/1.png").read_bytes()
    (tree / "train/dog/1.png").write_bytes(whole[: len(whole) // 2])
    (tree / "train/dog/2.png").write_text("not an image")
    with pytest.raises(
        UserError,
        match=r"2 of 8 .*train/dog/1\.png \(image file is truncated\); train/dog/2\.png \(no pic",
    ):
        take_inventory(tree_of(tree), "train", 1, cache, 2)
    skipping = take_inventory(tree_of(tree, skip_broken=True), "train", 1, cache, 2)
    assert [i.key for i in skipping[1].images] == ["train/dog/0.png", "train/dog/3.png"]


def test_content_digests_survive_a_copy_and_notice_a_change(tree, tmp_path):
    first = take_inventory(tree_of(tree), "train", 1, tmp_path / "a", 2)
    copy = shutil.copytree(tree, tmp_path / "copy", copy_function=shutil.copy)
    assert (
        take_inventory(tree_of(copy), "train", 1, tmp_path / "b", 2)[0].digests == first[0].digests
    )
    image(seed=77).save(tree / "train/cat/0.png")
    assert (
        take_inventory(tree_of(tree), "train", 1, tmp_path / "a", 2)[0].digests != first[0].digests
    )


def _remove(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (lambda r: _remove(r / "val"), {}, r"no folder val or validation"),
        (lambda r: _remove(r / "val/dog"), {}, r"1 of 2 class folders are missing .*dog"),
        (lambda r: [_remove(f) for f in (r / "train/dog").iterdir()], {}, r"dog holds no image"),
        (lambda r: None, {"classes": ["bird"]}, r"dataset\.classes='bird' .*cat, dog"),
        (lambda r: None, {"max_per_class": 0}, r"dataset\.max_per_class=0"),
        (lambda r: None, {"class_list": "imagenett"}, r"Did you mean imagenette\?"),
        (
            lambda r: None,
            {"skip_broken": "yes"},
            r"dataset\.skip_broken='yes' must be true or false",
        ),
        (lambda r: None, {"root": None}, r"dataset\.root is not set"),
    ],
)
def test_what_is_missing_is_said(tree, damage, options, message):
    damage(tree)
    with pytest.raises(UserError, match=message):
        tree_of(tree, **options)


def test_too_few_images_for_ipc(tree, tmp_path):
    with pytest.raises(UserError, match=r"class cat .* has 4 usable train images.* 5 needed"):
        take_inventory(tree_of(tree), "train", 5, tmp_path, 2)


def test_classes_can_be_chosen_and_limited(tree):
    dataset = tree_of(tree, classes=["dog"], max_per_class=3)
    assert [c.wnid for c in dataset.classes] == ["dog"]
    assert len(dataset.images("train", 0)) == 3
    assert len(dataset.images("val", 0)) == 2


def test_names_come_from_folders_or_a_table(tree):
    assert [c.name for c in ImageTree("t", None, str(tree), 16).classes] == ["cat", "dog"]
    (tree / "classes.csv").write_text('folder,name\ndog,"Labrador retriever, lab"\n', "utf-8-sig")
    named = ImageTree("t", None, str(tree), 16)
    assert [c.name for c in named.classes] == ["cat", "Labrador retriever, lab"]
    assert [c.wnid for c in named.classes] == ["cat", "dog"]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("dog,hound\n", "first line «folder,name»"),
        ("folder,name\nbird,robin\n", "'bird' is unknown.*Allowed: cat, dog"),
        ("folder,name\ndog,a\ndog,b\n", "line 3, names a folder twice"),
        ("folder,name\ndog,\n", "line 2, lacks a folder or a name"),
    ],
)
def test_a_wrong_table_of_names_is_refused(tree, table, message):
    (tree / "classes.csv").write_text(table)
    with pytest.raises(UserError, match=message):
        ImageTree("t", None, str(tree), 16)

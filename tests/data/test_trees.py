"""Layouts are recognised and read in place; what is left out is counted; wrong ones are named."""

import csv
import logging
import os
import shutil
import unicodedata

import numpy as np
import pytest
from conftest import image
from PIL import Image

from mgd3.data.class_lists import read_class_list
from mgd3.data.datasets import ImageFile, ImageTree, means
from mgd3.data.inventory import contents_of
from mgd3.data.layouts.listing import counted, list_pictures
from mgd3.runtime.errors import UserError

WNIDS = [c.wnid for c in read_class_list("imagenette")]


def tree_of(folder, **options):
    values = {"name": "t", "class_list": None, "root": str(folder), "student_size": 16}
    return ImageTree(**values | {"cache": folder.parent / "cache"} | options)


def keys(dataset, split):
    return [i.key for label in range(len(dataset.classes)) for i in dataset.images(split, label)]


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture
def archive(tmp_path):
    """fast.ai's imagenette2 by its names: 9,469 and 3,925 files, ImageNet's two splits mixed."""
    for w in WNIDS:
        count = 1194 if w == "n03000684" else 1300
        names = [f"{w}_{n}.JPEG" for n in range(count)]
        names += [f"ILSVRC2012_val_{1000 * WNIDS.index(w) + n:08d}.JPEG" for n in range(50)]
        for n, name in enumerate(names):
            touch(tmp_path / "a" / ("val" if n % 10 < 3 else "train") / w / name)
    return tmp_path / "a"


def test_imagenets_own_split_is_restored_by_name(archive):
    dataset = tree_of(archive, class_list="imagenette")
    assert "ImageNet's own split, restored" in dataset.note and " of 1,300" not in dataset.note
    for k, c in enumerate(dataset.classes):
        train, val = dataset.images("train", k), dataset.images("val", k)
        assert (len(train), len(val)) == (1194 if c.wnid == "n03000684" else 1300, 50)
        assert all(i.path.name.startswith(f"{c.wnid}_") for i in train)
        assert all(i.path.name.startswith("ILSVRC2012_val_") and i.path.is_file() for i in val)
        assert all(i.key.startswith(f"val/{c.wnid}/ILSVRC") for i in val)
    (archive / f"val/{WNIDS[0]}/{WNIDS[0]}_0.JPEG").unlink()
    assert "n01440764 has 1,299 of 1,300 train" in tree_of(archive, class_list="imagenette").note


def test_the_resplit_is_kept_where_it_is_asked_for(archive):
    kept = tree_of(archive, class_list="imagenette", split="fastai")
    assert "another dataset than the papers'" in kept.note
    assert len(kept.images("val", 0)) == 1350 * 3 // 10
    with pytest.raises(UserError, match=r"dataset\.split='papers' is unknown.*fastai"):
        tree_of(archive, class_list="imagenette", split="papers")


def test_imagenets_own_layout_is_not_taken_for_a_resplit(tmp_path):
    for w in WNIDS:
        touch(tmp_path / "a/train" / w / f"{w}_1.JPEG")
        touch(tmp_path / "a/val" / w / "ILSVRC2012_val_00000002.JPEG")
    assert tree_of(tmp_path / "a", class_list="imagenette").note is None


def flat(root, train, val):
    """ImageNet as it is handed out: validation files loose."""
    for k, w in enumerate(WNIDS):
        touch(root / train / w / f"{w}_1.JPEG")
        touch(root / val / f"ILSVRC2012_val_{k + 1:08d}.JPEG")


def test_kaggles_layout_is_read_in_place(tmp_path):
    root = tmp_path / "a"
    flat(root, "ILSVRC/Data/CLS-LOC/train", "ILSVRC/Data/CLS-LOC/val")
    with pytest.raises(UserError, match=r"loose, and nothing says their classes: put Kaggle's"):
        tree_of(root, class_list="imagenette")
    with (root / "LOC_val_solution.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["ImageId", "PredictionString"])
        for k, w in enumerate(reversed(WNIDS)):
            rows.writerow([f"ILSVRC2012_val_{k + 1:08d}", f"{w} 1 2 3 4 {w} 5 6 7 8"])
    dataset = tree_of(root, class_list="imagenette")
    assert [i.path.name[-13:-5] for i in dataset.images("val", 0)] == ["00000010"]
    assert keys(dataset, "val")[9] == f"val/{WNIDS[9]}/ILSVRC2012_val_00000001.JPEG"


def test_the_development_kits_tables_sort_the_validation_files(tmp_path):
    root = tmp_path / "a"
    flat(root, "train", "val")
    kit = root / "ILSVRC2012_devkit_t12/data"
    kit.mkdir(parents=True)
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join("3214567890"[:10]))
    with pytest.raises(UserError, match=r"map_clsloc\.txt, which names their numbers"):
        tree_of(root, class_list="imagenette")
    table = "\n".join(f"{w} {k} name" for k, w in enumerate(WNIDS))
    (kit / "map_clsloc.txt").write_text(table)
    dataset = tree_of(root, class_list="imagenette")
    assert [i.path.name[-6:-5] for i in dataset.images("val", 3)] == ["1"]  # the first file is 3
    assert len(keys(dataset, "val")) == 10


def test_tiny_imagenets_table_sorts_its_validation_files(tmp_path):
    root = tmp_path / "tiny"
    for k, w in enumerate(WNIDS):
        touch(root / "train" / w / "images" / f"{w}_0.JPEG")
        touch(root / "train" / w / f"{w}_boxes.txt")
        touch(root / "val/images" / f"val_{k}.JPEG")
    table = "\n".join(f"val_{k}.JPEG\t{w}\t0\t0\t9\t9" for k, w in enumerate(reversed(WNIDS)))
    (root / "val/val_annotations.txt").write_text(table + "\n")
    dataset = tree_of(root, class_list="imagenette")
    assert keys(dataset, "val")[9] == f"val/{WNIDS[9]}/val_0.JPEG"
    assert keys(dataset, "train")[0] == f"train/{WNIDS[0]}/images/{WNIDS[0]}_0.JPEG"
    assert f"{WNIDS[0]}: 1 file not pictures (.txt)" in dataset.remarks()


def test_many_folders_are_listed_at_once_with_the_same_result(tmp_path, caplog, monkeypatch):
    caplog.set_level("DEBUG")
    for w in WNIDS:
        touch(tmp_path / "a/train" / w / f"{w}_1.JPEG")
        touch(tmp_path / "a/val" / w / "ILSVRC2012_val_00000002.JPEG")
    one_by_one = tree_of(tmp_path / "a", class_list="imagenette")
    assert "listing" not in caplog.text
    monkeypatch.setattr("mgd3.data.layouts.trees._MANY_FOLDERS", 1)
    at_once = tree_of(tmp_path / "a", class_list="imagenette")
    assert "listing the real images: 20 folders in" in caplog.text
    for split in ("train", "val"):
        assert keys(at_once, split) == keys(one_by_one, split)


def test_fastais_small_archive_is_marked_wherever_it_lies(archive, tmp_path):
    small = archive.rename(tmp_path / "imagenette2-320")
    note = tree_of(small, class_list="imagenette").note
    assert "restored" in note and "shrunk to 320 px a side by fast.ai: not ImageNet's files" in note


def test_a_folder_name_too_long_for_what_is_made_of_it_is_one_line(tree):
    (tree / "train/cat").rename(tree / "train" / ("c" * 240))
    with pytest.raises(UserError, match=r"a class folder='c+' is no name; allowed: 1 to 100"):
        ImageTree("pets", None, str(tree), 64)


@pytest.fixture
def photographs(tmp_path):
    """cat and dog without a split, ten each."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(10):
            path = tmp_path / "p" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image(seed=100 * label + i).save(path)
    return tmp_path / "p"


def test_a_share_of_each_class_is_held_out_by_content(photographs):
    with pytest.raises(UserError, match=r"no train/ and val/, but the folders cat, dog; .*=0\.2"):
        tree_of(photographs)
    dataset = tree_of(photographs, val_fraction=0.2)
    assert [len(dataset.images("val", k)) for k in (0, 1)] == [2, 2]
    assert [len(dataset.images("train", k)) for k in (0, 1)] == [8, 8]
    assert "0.2 of each class" in dataset.note
    for wnid in ("cat", "dog"):  # ImageNet's training photographs without a split are no re-split
        (photographs / wnid / "0.png").rename(photographs / wnid / "n01440764_7.png")
    assert tree_of(photographs, val_fraction=0.2).note == dataset.note
    for wnid in ("cat", "dog"):
        (photographs / wnid / "n01440764_7.png").rename(photographs / wnid / "0.png")

    def held_out(root):
        found = tree_of(root, val_fraction=0.2)
        return {i.content() for k in (0, 1) for i in found.images("val", k)}

    before = held_out(photographs)
    for path in list((photographs / "cat").iterdir()):
        path.rename(path.with_name(f"x{9 - int(path.stem)}.png"))
    assert held_out(photographs) == before  # by content, not by name
    copy = shutil.copytree(photographs, photographs.parent / "copy")
    assert held_out(copy) == before
    with pytest.raises(UserError, match=r"dataset\.val_fraction=1 is out of range"):
        tree_of(photographs, val_fraction=1)


def test_what_is_left_out_is_counted(tree, caplog):
    for name in ("notes.txt", "a.txt", ".hidden.png", "._0.png", "Thumbs.db"):
        (tree / "train/cat" / name).touch()
    (tree / "train/cat/deep").mkdir()
    image(seed=50).save(tree / "train/cat/deep/more.bmp")
    (tree / "train/loose.png").touch()
    (tree / "val/bird").mkdir()
    (tree / "train/@eaDir").mkdir()
    dataset = tree_of(tree)
    assert [c.wnid for c in dataset.classes] == ["cat", "dog"]
    assert "train/cat/deep/more.bmp" in keys(dataset, "train")
    assert dataset.remarks() == [
        "classes of val/ that train/ has not are left out: bird",
        "1 files beside the class folders of train/ are left out",
        "cat: 2 files hidden, 2 files not pictures (.txt), 1 file of the operating system",
    ]
    with caplog.at_level(logging.WARNING):
        contents_of(dataset, ["val"], tree.parent / "c", 1)
    assert "dataset=t: cat: 2 files hidden" in caplog.text


def test_what_is_left_out_is_counted_once_where_both_splits_read_one_folder(photographs, archive):
    (photographs / "cat/.hidden.png").touch()
    (photographs / "cat/notes.txt").touch()
    said = "cat: 1 file hidden, 1 file not pictures (.txt)"
    assert tree_of(photographs, val_fraction=0.2).remarks() == [said]
    touch(archive / "val" / WNIDS[0] / "notes.txt")
    restored = tree_of(archive, class_list="imagenette")
    assert restored.remarks() == [f"{WNIDS[0]}: 1 file not pictures (.txt)"]


def test_odd_things_in_a_folder_without_a_split_are_named(photographs):
    (photographs / "cat/gone.png").symlink_to("nowhere")
    dataset = tree_of(photographs, val_fraction=0.2)
    assert len([k for s in ("train", "val") for k in keys(dataset, s)]) == 21
    with pytest.raises(UserError, match=r"gone\.png"):
        contents_of(dataset, ["val", "train"], photographs.parent / "c", 1)
    (photographs / "cat/gone.png").unlink()
    for path in sorted((photographs / "dog").iterdir())[1:]:
        path.unlink()
    with pytest.raises(UserError, match="dog holds one picture, and with dataset"):
        tree_of(photographs, val_fraction=0.2)
    (photographs / "cat/again").symlink_to(".")
    with pytest.raises(UserError, match=r"again cannot be listed \(Too many levels of symbolic"):
        tree_of(photographs, val_fraction=0.2)
    (photographs / "cat/again").unlink()
    os.mkdir(os.fsencode(photographs) + b"/owl\xe9")
    with pytest.raises(UserError, match=r"owl\?: the name is no UTF-8; rename the file or folder"):
        tree_of(photographs, val_fraction=0.2)


def test_copies_across_splits_and_classes_are_counted(tree, caplog):
    shutil.copy(tree / "train/cat/0.png", tree / "val/cat/again.png")
    shutil.copy(tree / "train/cat/1.png", tree / "train/dog/again.png")
    with caplog.at_level(logging.WARNING):
        contents_of(tree_of(tree), ["val", "train"], tree.parent / "c", 1)
    said = [r.message for r in caplog.records]
    # the fixture's test images are its first training images
    assert "dataset=t: 4 photographs stand among the training and the test images" in said
    assert "dataset=t: 1 photographs stand in two classes" in said


@pytest.mark.parametrize(
    ("change", "root", "message"),
    [
        (lambda r: None, "train", "is one of the splits: give the folder above it"),
        (lambda r: (r / "train").rename(r / "Train"), "", "has Train, val: call the folders"),
        (lambda r: (r / "val").rename(r / "test"), "", "has test, train: call the folders"),
        (lambda r: shutil.rmtree(r / "val"), "", "no folder val or validation; it has .* train;"),
        (lambda r: shutil.rmtree(r / "train"), "nothing", "does not exist or is no folder"),
    ],
)
def test_a_wrong_layout_is_answered_with_what_was_found(tree, change, root, message):
    change(tree)
    with pytest.raises(UserError, match=message):
        tree_of(tree / root)


def test_one_name_in_two_encodings_is_refused(tree):
    for form in ("NFC", "NFD"):
        for split in ("train", "val"):
            shutil.copytree(tree / split / "cat", tree / split / unicodedata.normalize(form, "é"))
    with pytest.raises(UserError, match="stands there twice, as composed and decomposed Unicode"):
        tree_of(tree)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (0, "0"), ("007", "007"), (float("nan"), "nan"), (None, "null"), (True, "true"),
        (1000.0, "1e3"), (1000, "1_000"), ("tench", "tench"), (-5, "-5"),
    ],
)  # fmt: skip
def test_a_class_called_like_a_number_is_found_as_the_command_line_reads_it(tree, key, text):
    assert means(key, text) and means(text, text)
    assert not means(key, "cat") and not means("cat", text)
    for split in ("train", "val"):
        shutil.copytree(tree / split / "cat", tree / split / text)
    assert [c.wnid for c in tree_of(tree, classes=[key, "dog"]).classes] == [text, "dog"]


def test_the_command_line_reads_names_so():
    """What Hydra makes of each name is what `means` expects of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for text in ("0", "9", "007", "nan", "NaN", "inf", "null", "true", "False", "1e3", "1_000"):
        value = OverridesParser.create().parse_override(f"dataset.classes=[{text}]").value()[0]
        assert means(getattr(value, "text", value), text), (text, value)


def test_names_of_two_classes_are_refused_and_folders_come_first():
    imagenet = read_class_list("imagenet1k")
    from mgd3.data.datasets import _class_of

    with pytest.raises(UserError, match=r"name of 2 classes; .* n02012849, n03126707"):
        _class_of(imagenet, "crane")
    assert _class_of(imagenet, "tench").wnid == "n01440764"
    assert _class_of(imagenet, "n01440764").name.startswith("tench")


def test_an_unquoted_comma_in_the_table_of_names_is_refused(tree):
    (tree / "classes.csv").write_text("folder,name\ndog,Labrador retriever, lab\n")
    with pytest.raises(UserError, match=r"classes\.csv, line 2, has a comma too many"):
        tree_of(tree)


@pytest.mark.parametrize(("most", "grey"), [(255, 255), (4095, 255), (0xFFFF, 255), (0x8000, 128)])
def test_deep_grey_is_scaled_by_its_bits(tmp_path, most, grey):
    Image.fromarray(np.full((4, 8), most, dtype=np.uint16)).save(tmp_path / "x.png")
    assert ImageFile("x", tmp_path / "x.png").decode().getpixel((0, 0)) == (grey,) * 3


def test_a_name_that_is_no_utf8_is_named(tree):
    bad = os.fsencode(tree / "train/cat/") + b"/\xff.png"
    with open(bad, "wb"):
        pass
    with pytest.raises(UserError, match=r"train/cat/\?.png: the name is no UTF-8; rename"):
        tree_of(tree)


def test_listings_count_in_words(tmp_path):
    assert list_pictures(tmp_path / "nothing").files == ()
    assert counted({"hidden": 1, "not pictures (.txt)": 5}) == (
        "1 file hidden, 5 files not pictures (.txt)"
    )

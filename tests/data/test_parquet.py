"""ImageNet and its subsets as parquet tables, from a folder and from a hub on this machine."""

import io
import json
import logging
import os
from pathlib import Path

import pytest
from conftest import image
from PIL import Image
from servers import HUB_TOKEN

from mgd3.data.class_lists import read_class_list
from mgd3.data.datasets import ImageTree
from mgd3.data.layouts import parquet
from mgd3.data.layouts.parquet import unpacked
from mgd3.runtime.errors import UserError

datasets = pytest.importorskip("datasets")

IMAGENET = read_class_list("imagenet1k")
WOOF = read_class_list("imagewoof")


def jpeg(seed):
    buffer = io.BytesIO()
    image(seed=seed).save(buffer, "JPEG")
    return buffer.getvalue()


def table(path, rows, names):
    """A parquet file of (content, name, label) rows, as the hub's converter writes them."""
    columns = {
        "image": [
            {"bytes": content, "path": name} if content or name else None
            for content, name, _ in rows
        ],
        "label": [label for *_, label in rows],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))


def imagenet_rows(split, labels):
    for label in labels:
        wnid = IMAGENET[label].wnid
        for k in range(2):
            name = (
                f"{wnid}_{k}_{wnid}.JPEG"
                if split == "train"
                else f"ILSVRC2012_val_{2 * label + k:08d}_{wnid}.JPEG"
            )
            yield jpeg(10 * label + k + 5 * (split == "train")), name, label


@pytest.fixture
def ilsvrc(tmp_path):
    """ImageNet-1K's tables in little: two training shards, one of validation, an unlabelled test.

    All of ImageWoof's classes and a few others are in them, in ImageNet's order of labels.
    """
    names = [c.name if c.imagenet_id not in (517, 639) else f"{c.name}2" for c in IMAGENET]
    labels = sorted({0, 1, 999, *(c.imagenet_id for c in WOOF)})
    folder = tmp_path / "imagenet-1k"
    half = len(labels) // 2
    for k, part in enumerate((labels[:half], labels[half:])):
        rows = list(imagenet_rows("train", part))
        table(folder / f"data/train-{k:05d}-of-00002.parquet", rows, names)
    rows = list(imagenet_rows("val", labels))
    table(folder / "data/validation-00000-of-00001.parquet", rows, names)
    table(folder / "data/test-00000-of-00001.parquet", [(jpeg(0), "t.JPEG", 0)], names)
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_wanted_classes_of_a_folder_of_tables_are_unpacked_once(ilsvrc, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    woof = ImageTree("imagewoof", "imagewoof", str(ilsvrc), 64, data=tmp_path / "data")
    assert [c.wnid for c in woof.classes] == [c.wnid for c in WOOF]
    expected = {
        f"{split}/{IMAGENET[label].wnid}/{name}": content
        for split in ("train", "val")
        for content, name, label in imagenet_rows(split, [c.imagenet_id for c in WOOF])
    }
    found = {k: v for k, v in files(woof.root).items() if not k.startswith(".")}
    assert found == expected
    assert "keeping the images of 10 of its 1000 classes" in caplog.text
    assert woof.note is None  # ImageNet's own split, by its files' names
    for file in ilsvrc.rglob("train*.parquet"):
        file.rename(file.with_suffix(".gone"))
        file.with_suffix(".gone").rename(file)
    caplog.clear()
    again = ImageTree("imagewoof", "imagewoof", str(ilsvrc), 64, data=tmp_path / "data")
    assert again.root == woof.root and "keeping" not in caplog.text
    more = ImageTree("two", "imagenet1k", str(ilsvrc), 64, ["n01440764", WOOF[0].wnid],
                     data=tmp_path / "data")  # fmt: skip
    assert "keeping the images of 1 of its 1000 classes" in caplog.text and more.root == woof.root


def test_a_killed_unpacking_goes_on_with_the_next_table(ilsvrc, tmp_path, monkeypatch):
    keep, kept = parquet._keep, []

    def killed(path, *rest):
        if len(kept) == 1:
            raise KeyboardInterrupt
        kept.append(path)
        keep(path, *rest)

    monkeypatch.setattr(parquet, "_keep", killed)
    with pytest.raises(KeyboardInterrupt):
        unpacked(str(ilsvrc), WOOF, tmp_path / "killed")
    (place,) = (tmp_path / "killed/tables").iterdir()
    assert not (place / "train").exists()
    monkeypatch.setattr(
        parquet, "_keep", lambda path, *rest: (kept.append(path), keep(path, *rest))
    )
    unpacked(str(ilsvrc), WOOF, tmp_path / "killed")
    assert len(kept) == len(set(kept)) == 3
    monkeypatch.undo()
    unpacked(str(ilsvrc), WOOF, tmp_path / "whole")
    (whole,) = (tmp_path / "whole/tables").iterdir()
    assert files(place) == files(whole)


@pytest.fixture
def offered(hub, ilsvrc):
    """The tables on the hub."""
    hub.files["ILSVRC/imagenet-1k"] = files(ilsvrc)
    hub.private["ILSVRC/imagenet-1k"] = False
    return hub


def test_the_hubs_tables_are_fetched_with_the_environments_token(offered, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    root = "hf://ILSVRC/imagenet-1k"
    woof = ImageTree("imagewoof", "imagewoof", root, 64, data=tmp_path / "data")
    assert woof.root == tmp_path / "data/tables/ILSVRC--imagenet-1k"
    assert len(woof.images("train", 0)) == len(woof.images("val", 0)) == 2
    assert offered.tokens - {None} == {f"Bearer {HUB_TOKEN}"} and HUB_TOKEN not in caplog.text
    assert "3 tables, 0.00 GB to read" in caplog.text
    assert not list(woof.root.rglob("*.parquet"))  # of the tables nothing stays
    offered.refuses = 500  # all is there: nobody is asked
    ImageTree("imagewoof", "imagewoof", root, 64, data=tmp_path / "data")
    assert json.loads((woof.root / ".commit.json").read_text())["commit"]


@pytest.mark.parametrize(
    ("status", "message"),
    [(403, "the hub refuses this account; check the name, and that its token may do this"),
     (500, "try the same command again later")],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(offered, tmp_path, status, message):
    offered.refuses = status
    with pytest.raises(UserError, match=message) as error:
        unpacked("hf://ILSVRC/imagenet-1k", WOOF, tmp_path)
    assert HUB_TOKEN not in str(error.value)


def test_fastais_tables_are_put_back_to_imagenets_split(tmp_path):
    nette, rows = read_class_list("imagenette"), {"train": [], "validation": []}
    names = ["tench", "English springer", "cassette player", "chain saw", "church",
             "French horn", "garbage truck", "gas pump", "golf ball", "parachute"]  # fmt: skip
    for label, info in enumerate(nette):
        for k, split in enumerate(rows):
            rows[split].append((jpeg(label + k), f"{info.wnid}_{k}.JPEG", label))
            name = f"ILSVRC2012_val_{10 * label + k:08d}.JPEG"
            rows[split].append((jpeg(99 + label + k), name, label))
    for size in ("160px", "full_size"):
        for split, kept in rows.items():
            table(tmp_path / "t" / size / f"{split}-00000-of-00001.parquet", kept, names)
    data = ImageTree("imagenette", "imagenette", str(tmp_path / "t/full_size"), 64, data=tmp_path)
    assert [len(data.images(s, 3)) for s in ("train", "val")] == [2, 2]
    assert data.note.startswith("ImageNet's own split, restored")
    with pytest.raises(UserError, match="has no folder train and val"):
        ImageTree("imagenette", "imagenette", str(tmp_path / "t"), 64, data=tmp_path)


def test_a_set_of_ones_own_has_its_labels_for_classes(tmp_path):
    rows = [(jpeg(k), None, k % 2) for k in range(6)]
    table(tmp_path / "t/train.parquet", rows, ["cat", "barn owl"])
    table(tmp_path / "t/test.parquet", rows[:2], ["cat", "barn owl"])
    data = ImageTree("pets", None, str(tmp_path / "t"), 64, data=tmp_path)
    assert [c.name for c in data.classes] == ["barn owl", "cat"]
    assert [len(data.images("train", label)) for label in (0, 1)] == [3, 3]
    with Image.open(data.images("train", 0)[0].path) as picture:
        assert picture.format == "JPEG"


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        (["cat", "dog"], [("a.jpg", 0)], r"has 0 labels called 'tench' \(n01440764\); it has cat"),
        (["tench", "x"], [("n03888257_1.JPEG", 0)], "labelled n01440764: the labels are"),
        (["tench", "x"], [("a.jpg", 1)], "no image for train has the class n01440764"),
        ([f"c{k}" for k in range(1000)], [("a.jpg", 0)], "1000 labels, of which 0 have the name"),
    ],
)  # fmt: skip
def test_tables_of_other_classes_are_refused(tmp_path, names, rows, message):
    for split in ("train", "validation"):
        table(tmp_path / f"t/{split}.parquet", [(jpeg(1), n, label) for n, label in rows], names)
    with pytest.raises(UserError, match=message):
        unpacked(str(tmp_path / "t"), IMAGENET[:1], tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*.JPEG"))


def test_tables_that_are_none_and_without_images_are_refused(tmp_path):
    (tmp_path / "t").mkdir()
    for split in ("train", "validation"):
        (tmp_path / f"t/{split}.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"\.parquet cannot be read"):
        unpacked(str(tmp_path / "t"), WOOF, tmp_path / "data")
    for split in ("train", "validation"):
        datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / f"t/{split}.parquet"))
    with pytest.raises(UserError, match="has the columns text; expected one of images"):
        unpacked(str(tmp_path / "t"), WOOF, tmp_path / "data")
    (tmp_path / "t/validation.parquet").unlink()
    with pytest.raises(UserError, match=r"called train-.* and validation-.*found train"):
        unpacked(str(tmp_path / "t"), WOOF, tmp_path / "data")


def pets(tmp_path, rows, names=("cat", "dog"), folder="t"):
    """A set of one's own, the same rows in both splits, and the folder to read it from."""
    for split in ("train", "validation"):
        table(tmp_path / folder / f"{split}.parquet", rows, list(names))
    return str(tmp_path / folder)


def own(root, tmp_path):
    return ImageTree("pets", None, root, 64, data=tmp_path / "data")


BOTH = [(jpeg(1), "a.jpg", 0), (jpeg(2), "b.jpg", 1)]


@pytest.mark.parametrize("stop", ["move", "journal"])
def test_a_process_killed_at_the_worst_moment_costs_no_image(ilsvrc, tmp_path, monkeypatch, stop):
    replaced, real = [], os.replace

    def move(old, new):  # killed when the training folders are in place, those of val not yet
        if "/val/n" in str(new) and ".part" not in str(new):
            raise KeyboardInterrupt
        real(old, new)

    def keep(path, *_):  # killed in the first shard
        replaced.append(path)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", move)
    with pytest.raises(KeyboardInterrupt):
        unpacked(str(ilsvrc), WOOF, tmp_path / "killed")
    monkeypatch.undo()
    (place,) = (tmp_path / "killed/tables").iterdir()
    (place / ".part/val" / WOOF[0].wnid / ".x.jpg.1.mgd3.tmp").write_bytes(b"half")
    if stop == "journal":  # other classes are begun, and not even their first shard is done
        monkeypatch.setattr(parquet, "_keep", keep)
        with pytest.raises(KeyboardInterrupt):
            unpacked(str(ilsvrc), IMAGENET[:1], tmp_path / "killed")
        monkeypatch.undo()
    unpacked(str(ilsvrc), WOOF, tmp_path / "killed")
    unpacked(str(ilsvrc), WOOF, tmp_path / "whole")
    (whole,) = (tmp_path / "whole/tables").iterdir()
    assert files(place) == files(whole)


def test_what_others_unpacked_is_read_where_nothing_can_be_written(ilsvrc, tmp_path, monkeypatch):
    there = unpacked(str(ilsvrc), WOOF, tmp_path)
    monkeypatch.setattr(parquet, "waiting", None)  # no lock is taken
    assert unpacked(str(ilsvrc), WOOF[:3], tmp_path) == there


def test_one_source_by_its_labels_and_by_a_class_list(tmp_path):
    root = pets(tmp_path, BOTH, ["tench", "x"])
    assert [c.name for c in own(root, tmp_path).classes] == ["tench", "x"]
    tench = ImageTree("one", "imagenet1k", root, 64, ["tench"], data=tmp_path / "data")
    assert [c.wnid for c in tench.classes] == ["n01440764"]
    assert [c.name for c in own(root, tmp_path).classes] == ["tench", "x"]


@pytest.mark.parametrize(
    ("content", "name", "expected"),
    [
        (jpeg(3), "../../x.jpg", "x.jpg"),
        (jpeg(3), "/etc/x.jpg", "x.jpg"),
        (jpeg(3), "..\\x.jpg", "train-000002.jpeg"),
        (jpeg(3), "a\0b.jpg", "train-000002.jpeg"),
        (jpeg(3), "n" * 300 + ".jpg", "train-000002.jpeg"),
        (jpeg(3), "\u732b" * 90 + ".jpg", "train-000002.jpeg"),  # more bytes than characters
        (jpeg(3), ".x.jpg", "train-000002.jpeg"),
        (jpeg(3), "x.txt", "train-000002.jpeg"),
        (jpeg(3), "b.jpg", "b.jpg"),
        (jpeg(3), "a.jpg", "train-000002-a.jpg"),
        (b"no picture", None, "train-000002.png"),
        (b"no picture", "c.jpg", "c.jpg"),
        (None, "/etc/passwd", "train-000002.png"),
        (None, None, "train-000002.png"),
    ],
)
def test_every_row_becomes_a_file_that_is_looked_at(tmp_path, content, name, expected):
    tree = own(pets(tmp_path, [*BOTH, (content, name, 0)]), tmp_path)
    names = [Path(image.key).name for image in tree.images("train", 0)]
    assert sorted(names) == sorted({"a.jpg", expected}) and tree.remarks() == []
    assert (tree.root / "train/cat" / expected).read_bytes() == (content or b"")
    assert not [f for f in files(tmp_path / "data") if not f.startswith("tables/")]


def test_pictures_without_a_name_keep_a_suffix_of_their_kind(tmp_path):
    buffer = io.BytesIO()
    image(seed=5).save(buffer, "JPEG2000")
    tree = own(pets(tmp_path, [(buffer.getvalue(), None, 0), BOTH[1]]), tmp_path)
    assert tree.images("train", 0)[0].decode().size == image(seed=5).size


def test_rows_without_a_label_and_labels_without_rows_are_said(tmp_path, caplog):
    rows = [*BOTH, (jpeg(3), "u.jpg", None)]
    assert len(own(pets(tmp_path, rows, ["cat", "dog", "cow"]), tmp_path).classes) == 2
    assert "train.parquet: 1 images without a label are left out" in caplog.text
    assert "no image for train/cow, val/cow: left out" in caplog.text


@pytest.mark.parametrize(
    ("names", "folder", "message"),
    [
        (["cat/x", "dog"], "t", "a class label='cat/x' is no name"),
        (["..", "dog"], "t", r"a class label='\.\.' is no name"),
        (["c" * 240, "dog"], "t", "1 to 100 characters"),
        ([".cat", "dog"], "t", r"a class label is '\.cat', and folders that are called so"),
        (["@eaDir", "dog"], "t", "not looked at: rename the class"),
        ([], "t", "expected one of images and one of class labels"),
        (["cat", "dog"], "a::b", "takes «::» for more than a name"),
    ],
)
def test_labels_and_folders_that_cannot_be_used_are_refused(tmp_path, names, folder, message):
    root = Path(pets(tmp_path, BOTH if names else [], names)).rename(tmp_path / folder)
    with pytest.raises(UserError, match=message):
        own(str(root), tmp_path)
    assert all(Path(f).name == ".lock" for f in files(tmp_path / "data"))


def test_folders_and_dead_links_called_parquet_are_no_tables(tmp_path):
    (tmp_path / "t/train.parquet").mkdir(parents=True)
    (tmp_path / "t/validation.parquet").symlink_to("nowhere")
    with pytest.raises(UserError, match="has no folder train and val"):
        own(str(tmp_path / "t"), tmp_path)


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("hf://", "the repository='/' is no repository"),
        ("hf://x", "the repository='x/' is no repository"),
        ("hf://../..", "is no repository"),
        ("hf:// a/b", "is no repository"),
        ("hf://a/b\0", "is no repository"),
        ("hf://a/b@", "the revision and each folder='' is no name"),
        ("hf://a/b@\n", "is no name"),
        ("hf://a/b/c/../d", r"each folder='\.\.' is no name"),
        (f"hf://a/b/{'s' * 300}", "1 to 100 characters"),
    ],
)
def test_what_is_no_address_of_the_hub_leaves_nothing(tmp_path, root, message):
    with pytest.raises(UserError, match=message):
        own(root, tmp_path)
    assert not (tmp_path / "data").exists()


def test_a_repository_whose_files_lead_out_of_it_is_refused(hub, tmp_path):
    hub.files["me/bad"] = {"data/../../../train.parquet": b"x", "val.parquet": b"x"}
    hub.private["me/bad"] = False
    with pytest.raises(UserError, match="which would lie outside its repository's folder"):
        unpacked("hf://me/bad", WOOF, tmp_path)


@pytest.mark.parametrize("endpoint", ["http://localhost:abc", f"http://{'a' * 70}.de", "http://["])
def test_an_endpoint_that_is_none_is_a_hub_out_of_reach(tmp_path, monkeypatch, endpoint):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    with pytest.raises(UserError, match="the hub cannot be reached"):
        unpacked("hf://me/some", WOOF, tmp_path)

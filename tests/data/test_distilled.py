"""The distilled folder, as others read it."""

import hashlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, image
from PIL import Image
from support import manifest
from torchvision.datasets import ImageFolder

from mgd3.data.datasets import ImageTree
from mgd3.data.distilled import DistilledDataset, DistilledWriter
from mgd3.distillers.real_images import FirstFiles, RandomReal
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError


@pytest.fixture
def distilled(tree, tmp_path):
    dataset = ImageTree("t", None, str(tree), 16, classes=["dog", "cat"])
    writer = DistilledWriter(tmp_path / "out", dataset, ipc=2, seed=5)
    for wnid in ("dog", "cat"):
        for k in range(2):
            grey = (10 * k + len(wnid),) * 3
            writer.write_image(wnid, k, Image.new("RGB", (4, 4), grey))
    streams = {"dog": [0, 1], "cat": [0, 1]}
    writer.finish({"method": "m", "config": {"ipc": 2}}, {"dog": ["a", "b"]}, streams=streams)
    return DistilledDataset(tmp_path / "out")


def test_labels_follow_the_datasets_order_not_the_folders(distilled):
    assert [c.wnid for c in distilled.classes] == ["dog", "cat"]
    assert [label for _, label in distilled.images()] == [0, 0, 1, 1]


def test_first_files_are_the_first_by_name(tree, tmp_path):
    for n in (10, 11):
        image(seed=n).save(tree / f"train/cat/{n}.png")
    dataset = ImageTree("t", None, str(tree), 16)
    work = Work(cache=tmp_path / "c", batch_size=4, workers=1, flip="none")
    made = FirstFiles(work).distill(dataset, 3, 7, tmp_path / "out", {"method": "m", "config": {}})
    names = [entry["nearest_real"] for entry in made.manifest["images"]]
    assert names[:3] == ["train/cat/0.png", "train/cat/1.png", "train/cat/10.png"]


def test_torchvision_reads_it(distilled):
    folder = ImageFolder(distilled.folder / "images")
    assert folder.classes == ["cat", "dog"]
    assert len(folder) == 4


AWKWARD = ("train", "test", "val", "dev", "a b", "[x]", "{y}", "été", "007", "null", "7", "__z")


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """Two images of each class: the first channel is the class's place, the second the image's."""
    folder = tmp_path_factory.mktemp("awkward")
    for split in ("train", "val"):
        for wnid in AWKWARD:
            (folder / "tree" / split / wnid).mkdir(parents=True)
            image().save(folder / "tree" / split / wnid / "0.png")
    dataset = ImageTree("t", None, str(folder / "tree"), 16, classes=list(AWKWARD))
    writer = DistilledWriter(folder / "out", dataset, ipc=2, seed=5)
    for label, wnid in enumerate(AWKWARD):
        for k in range(2):
            writer.write_image(wnid, k, Image.new("RGB", (4, 4), (label, k, 0)))
    writer.finish({"method": "m", "config": {}}, {})
    return folder / "out"


def read_as_written(pairs, names):
    """Is every image of the awkward set there, once, under its own class's name?"""
    pixels = [(picture.getpixel((0, 0))[:2], names[label]) for picture, label in pairs]
    expected = [((k, i), wnid) for k, wnid in enumerate(AWKWARD) for i in range(2)]
    return sorted(pixels) == expected


@pytest.mark.parametrize("library", ["torchvision", "datasets"])
def test_the_cards_lines_read_every_image_whatever_the_classes_are_called(
    awkward, library, tmp_path, monkeypatch
):
    import datasets
    import torchvision

    lines = re.search(r"```python\n(.*?)```", (awkward / "README.md").read_text(), re.S)[1]
    (line,) = (line for line in lines.splitlines() if line.startswith(library))
    monkeypatch.chdir(awkward)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    read = eval(line, {"datasets": datasets, "torchvision": torchvision})
    if library == "torchvision":
        assert read_as_written(read, read.classes)
    else:
        assert list(read) == ["train"]
        pairs = ((row["image"], row["label"]) for row in read["train"])
        assert read_as_written(pairs, read["train"].features["label"].names)
    assert read_as_written(DistilledDataset(awkward).images(), AWKWARD)


def test_the_cards_header_says_it_too(awkward, tmp_path):
    """`load_dataset` of the folder itself, as of a repository of the hub."""
    from datasets import load_dataset

    read = load_dataset(str(awkward), cache_dir=str(tmp_path / "hf"))
    assert list(read) == ["train"]
    pairs = ((row["image"], row["label"]) for row in read["train"])
    assert read_as_written(pairs, read["train"].features["label"].names)


def test_a_process_that_has_read_no_image_yet_reads_a_set(awkward):
    lines = (
        "import sys; from pathlib import Path; from mgd3.data.distilled import DistilledDataset; "
        "print(len(list(DistilledDataset(Path(sys.argv[1])).images())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines, str(awkward)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(2 * len(AWKWARD)), done.stderr


def test_the_page_about_python_reads_a_set_so_too(distilled, tmp_path, monkeypatch):
    page = (ROOT / "docs/python.md").read_text().split("## Read a distilled set")[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    distilled.folder.rename("distilled")
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], names)
    assert len(names["images"]) == len(names["torch_set"]) == len(names["hub_set"]) == 4
    assert names["hub_set"].features["label"].names == ["cat", "dog"] == names["torch_set"].classes


def test_the_manifest_says_how_it_was_made(distilled):
    made = json.loads((distilled.folder / "manifest.json").read_text())
    assert (made["method"], made["seed"], made["ipc"]) == ("m", 5, 2)
    assert made["config"] == {"ipc": 2}
    assert {"torch", "python", "diffusers"} <= made["versions"].keys()
    first = made["images"][0]
    assert first["file"] == "images/dog/00000.png"
    assert first["noise_stream"] == "5/dog/0"
    assert first["nearest_real"] == "a"
    assert (distilled.folder / "README.md").read_text().startswith("---\n")


def test_an_altered_image_is_noticed(distilled):
    image().save(distilled.folder / "images/dog/00001.png")
    with pytest.raises(UserError, match=r"checksums: images/dog/00001\.png"):
        list(distilled.images())


def test_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a finished distilled dataset"):
        _ = DistilledDataset(tmp_path).manifest


def _spoilt(**values):
    return json.dumps(manifest(**values))


def _image(**values):
    return _spoilt(images=[manifest()["images"][0] | values])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "dataset is missing"),
        ("[]", r"its content is \[\]"),
        ('{"images"', "is no JSON"),
        ("x", "is no JSON"),
        (_spoilt(ipc="10"), "ipc is '10': input should be a valid integer"),
        (_spoilt(classes=[]), "classes is"),
        (_spoilt(images=[]), "images is"),
        (_spoilt(dataset="../.."), "dataset is '../..': is no name"),
        (_spoilt(classes=[{"wnid": "a/b", "name": "x"}]), "classes.0.wnid is 'a/b'"),
        (_spoilt(classes=manifest()["classes"] * 2), "a class is there twice"),
        (_image(sha256="0"), "images.0.sha256 is '0'"),
        (_image(wnid="7"), "images/0/00000.png is of no class of it"),
        (_image(mass=float("nan")), "mass is nan"),
    ],
)
def test_a_manifest_of_another_structure_is_one_message(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    distilled = DistilledDataset(tmp_path)
    with pytest.raises(UserError, match="manifest"):
        _ = distilled.complete
    with pytest.raises(UserError, match=rf"manifest\.json:? .*{message}"):
        _ = distilled.classes


@pytest.mark.parametrize("file", ["/etc/passwd", "../secret.png", "images/link.png"])
def test_no_path_of_a_manifest_leaves_its_folder(tmp_path, file):
    image().save(tmp_path / "secret.png")
    (tmp_path / "set/images").mkdir(parents=True)
    if "link" in file:
        (tmp_path / "set/images/link.png").symlink_to(tmp_path / "secret.png")
    digest = hashlib.sha256((tmp_path / "secret.png").read_bytes()).hexdigest()
    (tmp_path / "set/manifest.json").write_text(_image(file=file, sha256=digest))
    with pytest.raises(
        UserError, match=r"names an image outside its folder|is a link, and links below"
    ):
        list(DistilledDataset(tmp_path / "set").images())


def test_replaced_images_are_noticed_once_and_for_all(distilled, tmp_path):
    distilled.verify(tmp_path / "cache", 2)
    path = distilled.folder / "images/dog/00000.png"
    before, stat = path.read_bytes(), path.stat()
    image(seed=7).save(path)
    with pytest.raises(UserError, match=r"1 images of .* images/dog/00000\.png; put the old"):
        distilled.verify(tmp_path / "cache", 2)
    path.write_bytes(before)
    os.utime(path, ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    distilled.verify(tmp_path / "cache", 2)


def test_while_a_set_is_made_no_other_image_is_taken_for_its_own(tree, tmp_path):
    dataset = ImageTree("t", None, str(tree), 16)
    first = DistilledWriter(tmp_path / "out", dataset, 2, 5)
    for index in (0, 1):
        first.write_image("dog", index, image(seed=index))
    image(seed=9).save(tmp_path / "out/images/dog/00001.png")
    (tmp_path / "out/images/cat").mkdir()
    image(seed=9).save(tmp_path / "out/images/cat/00000.png")
    again = DistilledWriter(tmp_path / "out", dataset, 2, 5)
    assert [again.has("dog", 0), again.has("dog", 1), again.has("cat", 0)] == [True, False, False]


def test_names_are_data_in_the_card(tree, tmp_path):
    (tree / "classes.csv").write_text("folder,name\ndog,<script>alert(1)</script> | [x](y)\n")
    dataset = ImageTree("a|<b>", None, str(tree), 16)
    writer = DistilledWriter(tmp_path / "out", dataset, 1, 5)
    for wnid in ("cat", "dog"):
        writer.write_image(wnid, 0, image())
    writer.finish({"method": "m", "config": {}}, {})
    card = (tmp_path / "out/README.md").read_text()
    assert "# a\\|\\<b>, 1 images" in card
    assert r"| dog | \<script>alert(1)\</script> \| [x]\(y) |" in card


def test_a_damaged_image_counts_as_missing(distilled, tree):
    writer = DistilledWriter(distilled.folder, ImageTree("t", None, str(tree), 16), 2, 5)
    path = distilled.folder / "images/dog/00000.png"
    assert writer.has("dog", 0)
    path.write_bytes(path.read_bytes()[:-20])
    assert not writer.has("dog", 0)
    assert not writer.has("dog", 7)


def test_random_draws_distinct_real_images_by_seed(tree, tmp_path):
    dataset = ImageTree("t", None, str(tree), 16)
    work = Work(cache=tmp_path / "cache", batch_size=4, workers=1, flip="none")

    def keys(seed, folder):
        out = RandomReal(work).distill(
            dataset, 3, seed, tmp_path / folder, {"method": "r", "config": {}}
        )
        entries = out.manifest["images"]
        for (picture, _), entry in zip(out.images(), entries, strict=True):
            real = dataset.images("train", 0 if entry["wnid"] == "cat" else 1)
            (source,) = [i for i in real if i.key == entry["nearest_real"]]
            assert np.array_equal(np.array(picture), np.array(source.decode()))
        return [e["nearest_real"] for e in entries]

    first = keys(0, "a")
    assert len(set(first)) == 6
    assert first == keys(0, "b")
    assert any(first != keys(seed, f"c{seed}") for seed in range(1, 5))


def test_masses_are_shares_of_the_class_and_become_weights(tmp_path, tree):
    dataset = ImageTree("t", None, str(tree), 16)
    writer = DistilledWriter(tmp_path / "out", dataset, ipc=2, seed=0)
    for wnid in ("cat", "dog"):
        for k in range(2):
            writer.write_image(wnid, k, Image.new("RGB", (4, 4)))
    provenance = {"method": "m", "config": {}}
    writer.finish(provenance, {}, masses={"cat": [0.75, 0.25], "dog": [0.5, 0.5]})
    assert DistilledDataset(tmp_path / "out").mass_weights() == [1.5, 0.5, 1, 1]
    writer.finish(provenance, {})
    with pytest.raises(UserError, match="made without modes"):
        DistilledDataset(tmp_path / "out").mass_weights()

"""The distilled folder, as others read it."""

import json

import numpy as np
import pytest
from conftest import image
from PIL import Image
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
    dataset = ImageTree("t", None, str(tree), 16)
    for n in (10, 11):
        image(seed=n).save(tree / f"train/cat/{n}.png")
    work = Work(cache=tmp_path / "c", batch_size=4, workers=1, flip="none")
    made = FirstFiles(work).distill(dataset, 3, 7, tmp_path / "out", {"method": "m", "config": {}})
    names = [entry["nearest_real"] for entry in made.manifest["images"]]
    assert names[:3] == ["train/cat/0.png", "train/cat/1.png", "train/cat/10.png"]


def test_torchvision_reads_it(distilled):
    folder = ImageFolder(distilled.folder / "images")
    assert folder.classes == ["cat", "dog"]
    assert len(folder) == 4


def test_hugging_face_reads_it(distilled, tmp_path):
    from datasets import load_dataset

    data = load_dataset(
        "imagefolder", data_dir=str(distilled.folder / "images"), cache_dir=str(tmp_path / "hf")
    )["train"]
    assert data.features["label"].names == ["cat", "dog"]
    assert len(data) == 4


def test_the_manifest_says_how_it_was_made(distilled):
    manifest = json.loads((distilled.folder / "manifest.json").read_text())
    assert (manifest["method"], manifest["seed"], manifest["ipc"]) == ("m", 5, 2)
    assert manifest["config"] == {"ipc": 2}
    assert {"torch", "python", "diffusers"} <= manifest["versions"].keys()
    first = manifest["images"][0]
    assert first["file"] == "images/dog/00000.png"
    assert first["noise_stream"] == "5/dog/0"
    assert first["nearest_real"] == "a"
    assert (distilled.folder / "README.md").read_text().startswith("---\n")


def test_an_altered_image_is_noticed(distilled):
    image().save(distilled.folder / "images/dog/00001.png")
    with pytest.raises(UserError, match=r"dog/00001\.png .*checksum"):
        list(distilled.images())


def test_an_unfinished_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a finished distilled dataset"):
        _ = DistilledDataset(tmp_path).manifest


@pytest.mark.parametrize("content", ["{}", "[]", '{"images": []}'])
def test_a_manifest_without_what_is_needed_is_one_message(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    distilled = DistilledDataset(tmp_path)
    assert not distilled.complete
    with pytest.raises(UserError, match=r"manifest\.json has no dataset, classes, ipc, method"):
        _ = distilled.classes


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

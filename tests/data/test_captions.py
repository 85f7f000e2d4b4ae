"""A user's file of captions: what it must hold for every training image."""

import json
import logging

import pytest

from mgd3.data.captions import captions_of, read_captions
from mgd3.data.datasets import ImageTree
from mgd3.data.inventory import take_inventory
from mgd3.runtime.errors import UserError

NAMES = [f"{wnid}/{k}.png" for wnid in ("cat", "dog") for k in range(4)]


def write(path, captions):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def found(tree, tmp_path):
    """The captions that a file gives to the images of `tree`."""
    dataset = ImageTree("pets", None, str(tree), 16)
    inventory = take_inventory(dataset, "train", 1, tmp_path / "cache", 1)

    def of(captions):
        return captions_of(write(tmp_path / "captions.jsonl", captions), dataset, inventory)

    return of


def test_captions_come_in_the_order_of_the_images(found):
    whole = {name: f" about {name} " for name in reversed(NAMES)}
    assert found(whole) == [[f"about {n}" for n in NAMES[:4]], [f"about {n}" for n in NAMES[4:]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cat/1.png": None, "dog/2.png": None},
            r"no caption for 2 of 8 .*the first is cat/1\.png",
        ),
        ({"dog/0.png": " "}, r"an empty caption for 1 of 8 .*the first is dog/0\.png"),
    ],
)
def test_an_image_without_a_caption_is_named(found, change, message):
    captions = {name: "text" for name in NAMES} | change
    with pytest.raises(UserError, match=message):
        found({name: text for name, text in captions.items() if text is not None})


def test_paths_from_elsewhere_are_shown(found):
    with pytest.raises(UserError, match=r"\(the file's first name is train/cat/0\.png\)"):
        found({f"train/{name}": "text" for name in NAMES})


def test_captions_of_no_image_are_counted_and_those_of_other_classes_are_not(found, caplog):
    with caplog.at_level(logging.WARNING):
        found({name: "text" for name in (*NAMES, "dog/8.png", "dog/9.png", "bird/0.png")})
    (record,) = caplog.records
    assert "2 captions are of no training image of dataset=pets, the first of dog/8.png" in (
        record.getMessage()
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"file_name": "a.png", "text": "a"}\n{"file_name"', r"line 2 is no JSON"),
        ('{"file_name": "a.png"}', r"line 1: text is missing; each line must be an object"),
        ('{"file_name": "a.png", "text": 3}', r"line 1: text is 3"),
        ('["a.png", "a"]', r"line 1: its content is"),
        ('{"file_name": "a.png", "text": "a"}\n\n{"file_name": "./a.png", "text": "b"}',
         r"line 3, is a second caption of a\.png"),
    ],
)  # fmt: skip
def test_another_file_is_refused_by_its_line(tmp_path, text, message):
    path = tmp_path / "captions.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(path)


def test_other_encodings_are_refused(tmp_path):
    path = tmp_path / "captions.jsonl"
    path.write_bytes('{"file_name": "a.png", "text": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match="save it as UTF-8"):
        read_captions(path)

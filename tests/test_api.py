"""The README's lines of Python, as they stand."""

import re
import shutil

import pytest
from conftest import ROOT

from mgd3.api import distil
from mgd3.backbones.toy import Toy
from mgd3.data.datasets import Digits, ImageTree
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import ModeGuidance, NoGuidance
from mgd3.sampling.samplers import DDPM


def test_the_readmes_lines_distil_a_folder(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text().split("## From Python")[1]
    lines = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert len([line for line in lines.splitlines() if line]) == 10
    digits = Digits(8)
    for split in ("train", "val"):
        for label, info in enumerate(digits.classes):
            folder = tmp_path / "photos" / split / info.wnid
            folder.mkdir(parents=True)
            for n, image in enumerate(digits.images(split, label)[:12]):
                image.decode().save(folder / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(lines, "README.md", "exec"), names)
    images = names["images"]
    assert len(images) == 100
    assert images[0][0].size == (8, 8) and images[0][1] == "0" and images[-1][1] == "9"
    assert (tmp_path / "distilled/manifest.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ipc": 0}, "ipc=0"),
        ({"batch_size": 0}, r"batch_size \(or auto\)=0"),
        ({"batch_size": "Auto"}, r"batch_size \(or auto\)='Auto'"),
        ({"guidance": ModeGuidance(0.1, 99)}, r"guidance\.stop_t=99"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, options, message):
    defaults = {"ipc": 1, "sampler": DDPM(5, 1.0, 3, variance="fixed"), "guidance": NoGuidance()}
    toy = Toy(8, mean=0.0, shift=0.1, std=0.3)
    with pytest.raises(UserError, match=message):
        distil(Digits(8), toy, out=tmp_path / "out", cache=tmp_path, **defaults | options)


def test_other_photographs_or_names_are_other_settings(tree, tmp_path):
    def call(root):
        photos = ImageTree("photos", None, str(root), 16)
        toy, sampler = Toy(8, mean=0.0, shift=0.1, std=0.3), DDPM(5, 1.0, 3, variance="fixed")
        return distil(photos, toy, 1, tmp_path / "out", sampler=sampler, guidance=NoGuidance())

    call(tree)
    shutil.copytree(tree, tmp_path / "another")
    with pytest.raises(UserError, match=r"dataset\.location="):
        call(tmp_path / "another")
    (tree / "classes.csv").write_text("folder,name\ndog,hound\n")
    with pytest.raises(UserError, match=r"dataset\.classes\.dog=hound \(there: dog\)"):
        call(tree)


def test_a_second_call_finds_the_images_and_other_settings_are_refused(tree, tmp_path):
    def call(guidance):
        return distil(
            Digits(8),
            Toy(8, mean=0.0, shift=0.1, std=0.3),
            ipc=1,
            out=tmp_path / "out",
            sampler=DDPM(5, 1.0, 3, variance="fixed"),
            guidance=guidance,
            cache=tmp_path / "cache",
        )

    stamp = (call(ModeGuidance(0.1, 2)).folder / "manifest.json").stat().st_mtime_ns
    assert (call(ModeGuidance(0.1, 2)).folder / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(
        UserError, match=r"guidance\.scale=0\.2 \(there: 0\.1\); choose another folder"
    ):
        call(ModeGuidance(0.2, 2))
    with pytest.raises(UserError, match=r"guidance\.class=NoGuidance"):
        call(NoGuidance())

"""The lines of Python that docs/python.md shows, as they stand."""

import re
import shutil

import pytest
from conftest import ROOT, image

from mgd3.api import distil
from mgd3.backbones.dit import DiT
from mgd3.backbones.toy import Toy
from mgd3.data.datasets import ImageTree
from mgd3.data.digits import Digits
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import ModeGuidance, NoGuidance
from mgd3.sampling.guidances.deviation import DeviationGuidance
from mgd3.sampling.samplers import DDPM


def test_the_ten_lines_distil_a_folder(tmp_path, monkeypatch):
    text = (ROOT / "docs/python.md").read_text().split("## Ten lines")[1]
    lines = re.search(r"```python\n(.*?)```", text, re.S)[1]
    assert len([line for line in lines.splitlines() if line]) == 10
    digits = Digits(8)
    for split in ("train", "val"):
        for label, info in enumerate(digits.classes):
            folder = tmp_path / "photos" / split / info.wnid
            folder.mkdir(parents=True)
            for n, digit in enumerate(digits.images(split, label)[:12]):
                digit.decode().save(folder / f"{n}.png")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(lines, "docs/python.md", "exec"), names)
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


def test_other_photographs_or_names_are_other_settings_and_a_moved_root_is_not(tree, tmp_path):
    def call(root):
        photos = ImageTree("photos", None, str(root), 16)
        toy, sampler = Toy(8, mean=0.0, shift=0.1, std=0.3), DDPM(5, 1.0, 3, variance="fixed")
        return distil(
            photos, toy, 1, tmp_path / "out", sampler=sampler, guidance=NoGuidance(),
            cache=tmp_path / "cache",
        )  # fmt: skip

    call(tree)
    stamp = (tmp_path / "out/manifest.json").stat().st_mtime_ns
    moved = shutil.copytree(tree, tmp_path / "another")
    call(moved)
    assert (tmp_path / "out/manifest.json").stat().st_mtime_ns == stamp
    image(seed=999).save(moved / "train/dog/0.png")
    with pytest.raises(UserError, match=r"1 of 8 training images changed since .*another folder"):
        call(moved)
    (tree / "classes.csv").write_text("folder,name\ndog,hound\n")
    with pytest.raises(UserError, match=r"classes\.dog=hound \(there: dog\)"):
        call(tree)


def test_every_step_is_shown(tmp_path):
    seen = []
    distil(
        Digits(8, classes=[3, 5]), Toy(8, mean=0.0, shift=0.1, std=0.3), 2, tmp_path / "out",
        sampler=DDPM(5, 1.0, 3, variance="fixed"), guidance=NoGuidance(), cache=tmp_path,
        batch_size=3, on_step=seen.append,
    )  # fmt: skip
    assert [state.step for state in seen] == [4, 3, 2, 1, 0] * 2
    assert seen[0].images == [("3", 0), ("3", 1), ("5", 0)] and seen[-1].images == [("5", 1)]
    assert seen[0].x_t.shape == seen[0].x0_hat.shape == (3, 1, 8, 8)


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


def test_parts_within_parts_and_what_weights_hold_are_settings(tmp_path):
    def call(window=(0, 1)):
        return distil(
            Digits(8, classes=[3, 5]), DiT(str(weights), None, image_size=8), 1, tmp_path / "out",
            sampler=DDPM(3, 1.0, 3), guidance=DeviationGuidance(1.0, *window, 4),
            cache=tmp_path / "cache",
        )  # fmt: skip

    weights = tmp_path / "dit.safetensors"
    shutil.copy(ROOT / "mgd3/backbones/weights/dit_digits.safetensors", weights)
    call()
    with pytest.raises(UserError, match=r"guidance\.window\.high=2 \(there: 1\)"):
        call((0, 2))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # a network that was trained once more, into the same file
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"files\.backbone\.weights="):
        call()

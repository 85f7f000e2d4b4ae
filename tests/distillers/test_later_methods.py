"""Presets of methods after MGD3: whole runs, one that dies on the way, what they refuse."""

import json
import os

import numpy as np
import pytest
from conftest import QUICK, run
from PIL import Image

SMALL = (
    *QUICK, "backbone=dit_digits", "dataset.classes=[1,7]", "ipc=2", "sampler.steps=4",
    "students=[]", "compute.batch_size=3",
)  # fmt: skip
METHODS = {
    "manifoldgd": ("method=manifoldgd",),
    "dap": ("method=dap", "guidance.real_images=8"),
}


class KilledError(BaseException):
    """Nothing that the program catches."""


def images(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("images/*/*.png")}


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_dies_is_finished_with_the_same_bytes(tmp_path, monkeypatch, name):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    assert run(whole, *SMALL, *METHODS[name]).returncode == 0
    expected = images(whole)
    assert len(expected) == 4 and len(set(expected.values())) == 4
    replace = os.replace

    def until_the_second_image(source, target, **kwargs):
        if str(target).endswith("00001.png"):
            raise KilledError
        return replace(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", until_the_second_image)
    assert run(stopped, *SMALL, *METHODS[name]).returncode == 1
    monkeypatch.setattr(os, "replace", replace)
    assert 0 < len(images(stopped)) < 4
    again = run(stopped, *SMALL, *METHODS[name])
    assert again.returncode == 0, again.stderr
    assert images(stopped) == expected


def test_a_backbone_without_features_is_refused_before_sampling(tmp_path):
    done = run(tmp_path, *SMALL, "method=dap", "backbone=toy")
    assert done.returncode == 1 and "which Toy does not show" in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.rglob("*.png"))
    done = run(tmp_path, *SMALL, "method=dap", "guidance.block=9")
    assert "guidance.block=9 is out of range; allowed: 1..6" in done.stderr


def test_an_image_is_remade_alone_with_what_its_guidance_learned(tmp_path):
    assert run(tmp_path, *SMALL, *METHODS["dap"]).returncode == 0
    (manifest,) = tmp_path.rglob("manifest.json")
    folder, image = f"set={manifest.parent}", "image=images/7/00001.png"
    done = run(tmp_path, folder, image, "out=again.png", script="scripts/remake_image.py")
    assert done.returncode == 0, done.stderr
    with Image.open(manifest.parent / image[6:]) as file, Image.open(tmp_path / "again.png") as new:
        before, after = (np.asarray(one.convert("RGB"), int) for one in (file, new))
    assert np.abs(before - after).max() <= 1

    content = json.loads(manifest.read_text())
    content["identity"]["guidance"]["version"] = 1  # which had another scale
    manifest.write_text(json.dumps(content))
    done = run(tmp_path, folder, image, "out=other.png", script="scripts/remake_image.py")
    assert done.returncode == 1 and not (tmp_path / "other.png").exists()
    assert "version 1 of guidance=prior, and here is 2" in done.stderr
    told = "with=['guidance.scale=0.03']"
    done = run(tmp_path, folder, image, told, "out=other.png", script="scripts/remake_image.py")
    assert done.returncode == 0 and (tmp_path / "other.png").exists(), done.stderr

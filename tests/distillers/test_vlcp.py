"""VLCP from the command line, with a small text-to-image pipeline: a prompt for each image."""

import json
import logging
import os
import re

import numpy as np
import pytest
import torch
from conftest import QUICK, image, run
from networks import LATENT, small_stable_diffusion
from PIL import Image

from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.distillers.image_maker import ImageMaker, Making
from mgd3.distillers.refining import NoRefinement
from mgd3.modes.discovery import ModeFile
from mgd3.modes.mode_captions import members, prompt_rows
from mgd3.sampling.guidance import NoGuidance
from mgd3.sampling.samplers import DDIM
from mgd3.sampling.starts import NoiseStart, PrototypeStart

COUNT = 14  # images of a class, two of which are outliers
WORDS = (
    "red", "blue", "tall", "small", "round", "flat", "old", "new", "wet", "dry", "dark", "light",
    "near", "far",
)  # fmt: skip
CLASSES = ("cat", "dog")


class KilledError(BaseException):
    """Nothing that the program catches."""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A pipeline, photographs and their captions, no two alike."""
    folder = tmp_path_factory.mktemp("vlcp")
    small_stable_diffusion(folder / "pipeline")
    lines = []
    for split, count in (("train", COUNT), ("val", 1)):
        for label, wnid in enumerate(CLASSES):
            place = folder / "photos" / split / wnid
            place.mkdir(parents=True)
            for k in range(count):
                image(seed=100 * label + k, size=(64, 64)).save(place / f"{k:02d}.png")
                text = f"a {WORDS[k]} {wnid}, {WORDS[(3 * k + label) % COUNT]} one"
                if split == "train":
                    lines.append({"file_name": f"{wnid}/{k:02d}.png", "text": text})
    (folder / "captions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def arguments(here, *more):
    return (
        *QUICK, "method=vlcp", "backbone=sd15", f"backbone.weights={here / 'pipeline'}",
        f"backbone.image_size={8 * LATENT}", "backbone.output_size=32", "dataset=folder",
        f"dataset.root={here / 'photos'}", "dataset.student_size=16", "students=[]", "ipc=3",
        f"prompts.captions={here / 'captions.jsonl'}", "sampler.steps=6", "compute.batch_size=4",
        "protocol=hard_label_short", *more,
    )  # fmt: skip


def images(folder):
    files = sorted(folder.rglob("images/*/*.png"))
    return {"/".join(f.parts[-2:]): f.read_bytes() for f in files}


@pytest.fixture(scope="module")
def whole(here, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("whole")
    done = run(cwd, *arguments(here))
    assert done.returncode == 0, done.stderr
    (manifest,) = cwd.rglob("manifest.json")
    return manifest.parent


def test_each_images_prompt_is_a_caption_of_its_own_cluster(here, whole):
    rows = map(json.loads, (here / "captions.jsonl").read_text().splitlines())
    captions = {row["file_name"]: row["text"] for row in rows}
    prompts = json.loads((whole / "prompts.json").read_text())
    entries = json.loads((whole / "manifest.json").read_text())["images"]
    assert len(entries) == 6 and list(prompts) == list(CLASSES)
    for wnid in CLASSES:
        own = [entry["prompt"] for entry in entries if entry["wnid"] == wnid]
        assert own == prompts[wnid] and len(set(own)) == 3
        modes = ModeFile().read(whole / f"modes/{wnid}.safetensors", {})
        assert (modes.assignment < 0).sum() == 2 and modes.counts.sum() == COUNT - 2
        for prompt, rows_of_mode in zip(own, members(modes), strict=True):
            assert prompt in [captions[f"{wnid}/{k:02d}.png"] for k in rows_of_mode]


def test_a_run_that_dies_is_finished_with_the_same_bytes(here, whole, tmp_path, monkeypatch):
    expected, replace = images(whole), os.replace
    assert len(set(expected.values())) == 6

    def until_the_second_image(source, target, **kwargs):
        if str(target).endswith("00001.png"):
            raise KilledError
        return replace(source, target, **kwargs)

    monkeypatch.setattr(os, "replace", until_the_second_image)
    assert run(tmp_path, *arguments(here)).returncode == 1
    monkeypatch.setattr(os, "replace", replace)
    assert 0 < len(images(tmp_path)) < 6
    again = run(tmp_path, *arguments(here))
    assert again.returncode == 0, again.stderr
    assert images(tmp_path) == expected


def test_an_image_is_remade_alone_under_its_own_prompt(here, whole, tmp_path):
    mine = (f"dataset.root={here / 'photos'}", f"backbone.weights={here / 'pipeline'}")
    done = run(
        tmp_path, f"set={whole}", "image=images/dog/00002.png", f"with={json.dumps(mine)}",
        script="scripts/remake_image.py",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    prompt = json.loads((whole / "prompts.json").read_text())["dog"][2]
    assert f"its prompt is {prompt!r}" in done.stdout + done.stderr
    with (
        Image.open(whole / "images/dog/00002.png") as file,
        Image.open(tmp_path / "remade.png") as new,
    ):
        before, after = (np.asarray(one.convert("RGB"), int) for one in (file, new))
    assert np.abs(before - after).max() <= 1


def test_other_captions_under_the_same_name_are_refused(here, whole):
    path = here / "captions.jsonl"
    before = path.read_text()
    try:
        path.write_text(before.replace("red cat", "odd cat"))
        refused = run(whole.parents[4], *arguments(here))
    finally:
        path.write_text(before)
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "prompts.captions" in refused.stderr, refused.stderr


REFUSED = {
    "no captions": (("prompts.captions=none.jsonl",), r"none\.jsonl: there is no such file"),
    "a small class": (("ipc=13",), r"class cat \(cat\) has 14 .*too few for ipc=13"),
    "captions of others": (
        ("prompts.captions=few.jsonl",),
        r"few\.jsonl has no caption for 27 of 28 training images, the first is cat/01\.png",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_refused_before_sampling(here, tmp_path, why):
    (tmp_path / "few.jsonl").write_text('{"file_name": "cat/00.png", "text": "a cat"}')
    more, message = REFUSED[why]
    done = run(tmp_path, *arguments(here, *more))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert not list(tmp_path.rglob("*.png"))
    if "captions" in why:  # or a corrected file would be another one than the folder's
        assert not list(tmp_path.rglob("identity.json"))
        planned = run(tmp_path, *arguments(here, *more, "plan=true"))
        assert re.search(message, planned.stdout + planned.stderr)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("backbone=sd15",), "prompts.captions is not set; give it as prompts.captions=VALUE"),
        (("backbone=toy", "prompts.captions=c.jsonl"), "takes text, which Toy does not: choose"),
        (("backbone=dit_digits", "prompts.captions=c.jsonl"), "takes text, which DiT does not"),
        (("backbone=ldm_cin256", "prompts.captions=c.jsonl"), "which LDM does not"),
    ],
)
def test_what_the_preset_needs_is_asked_for_by_name(tmp_path, more, message):
    (tmp_path / "c.jsonl").write_text('{"file_name": "1/000.png", "text": "a one"}')
    done = run(tmp_path, *QUICK, "method=vlcp", *more)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert message in done.stderr, done.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_images_of_a_class_differ_by_their_prompts_under_the_same_noise(here):
    backbone = StableDiffusion(str(here / "pipeline"), image_size=8 * LATENT, output_size=32)
    maker = ImageMaker(backbone, DDIM(4, 10.0, 4), NoGuidance(), NoiseStart(), NoRefinement())

    def latents(*prompts):
        """Of image 0 of the class, whose prompt is the first."""
        rows = prompt_rows(backbone, {"cat": prompts} if prompts else {})
        making = Making(seed=0, rows={"cat": of_class}, labels={"cat": 0}, found={}, own_rows=rows)
        return maker.sample([("cat", 0)], making)

    (of_class,) = backbone.prompt_ids(["cat"])
    one, same, other = latents("a red cat", "a cat"), latents("a red cat"), latents("a wet cat")
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(latents(), latents("cat"))


def test_candidates_of_a_mode_share_its_prompt():
    making = Making(
        seed=0, rows={"cat": 1}, labels={"cat": 0}, found={}, own_rows={"cat": [5, 6, 7]}
    )
    assert [making.row(("cat", k)) for k in (0, 2, 3, 7)] == [5, 7, 5, 6]


def test_strength_takes_35_of_50_steps():
    assert PrototypeStart(0.7).steps(50) == 35


def test_many_long_captions_are_one_warning(here, caplog):
    backbone = StableDiffusion(str(here / "pipeline"), image_size=8 * LATENT, output_size=32)
    with caplog.at_level(logging.WARNING):
        backbone.prompt_ids(["x" * 80, "y" * 75, "z" * 90])
    (record,) = caplog.records
    assert "takes 75; cut off: 'xxxxx'; 1 more prompts are too long" in record.getMessage()

"""Backbones x samplers x {guided, unguided}: whole runs of small networks, batches of 1, 5."""

import pytest
import torch
from networks import compvis_tensors, small_stable_diffusion, small_stable_diffusion_xl, small_vae
from support import GOLDEN

from mgd3.backbones.dit import DiT
from mgd3.backbones.ldm import LDM
from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.backbones.stable_diffusion_xl import StableDiffusionXL
from mgd3.backbones.toy import Toy
from mgd3.data.datasets import ImageTree
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.modes.finders import KMeansModes
from mgd3.runtime.compute import Work
from mgd3.sampling.guidance import ModeGuidance, NoGuidance
from mgd3.sampling.samplers import DDIM, DDPM

CLASSES = ("n01440764", "n01443537")  # ImageNet's first two, which every network here knows


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    small_vae(folder / "vae")
    torch.save({"state_dict": compvis_tensors()}, folder / "model.ckpt")
    small_stable_diffusion(folder / "epsilon")
    small_stable_diffusion(folder / "v", "v_prediction")
    small_stable_diffusion_xl(folder / "xl")
    return folder


BACKBONES = {
    "toy": lambda w: Toy(8, mean=0.0, shift=0.2, std=0.3),
    "dit": lambda w: DiT(str(GOLDEN / "dit_mode_guidance.pt"), str(w / "vae"), 64, num_heads=4),
    "ldm": lambda w: LDM(str(w / "model.ckpt"), 64, cache=w),
    "sd epsilon": lambda w: StableDiffusion(str(w / "epsilon"), 64, 32),
    "sd v": lambda w: StableDiffusion(str(w / "v"), 64, 32, latents="mean"),
    "sdxl": lambda w: StableDiffusionXL(str(w / "xl"), 64, 32),
}


@pytest.fixture
def photos(tree):
    for split in ("train", "val"):
        for old, new in zip(("cat", "dog"), CLASSES, strict=True):
            (tree / split / old).rename(tree / split / new)
    return ImageTree("photos", None, str(tree), 16)


@pytest.mark.parametrize("guided", [True, False], ids=["guided", "unguided"])
@pytest.mark.parametrize("kind", [DDPM, DDIM])
@pytest.mark.parametrize("name", BACKBONES)
def test_batches_of_one_and_five_agree(name, kind, guided, weights, photos, tmp_path):
    backbone = BACKBONES[name](weights)
    learned = name == "dit" and kind is DDPM
    options = {"variance": "learned" if learned else "fixed"} if kind is DDPM else {}
    pictures = {}
    for size in (1, 5):
        distiller = GenerativeDistiller(
            backbone,
            kind(steps=4, cfg_scale=2.0, cfg_channels=3, **options),
            ModeGuidance(0.1, 1) if guided else NoGuidance(),
            KMeansModes(),
            Work(cache=tmp_path / "cache", batch_size=size, workers=1, flip="none"),
        )
        out = distiller.distill(photos, 3, 0, tmp_path / str(size), {"method": "m", "config": {}})
        made = list(out.images())
        assert [label for _, label in made] == [0, 0, 0, 1, 1, 1]
        assert {image.size for image, _ in made} == {(backbone.codec.output_size,) * 2}
        pictures[size] = torch.stack(
            [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image, _ in made]
        ).int()
    assert (pictures[1] - pictures[5]).abs().max() <= 1
    assert pictures[1].float().std(dim=0).max() > 0  # not one picture six times

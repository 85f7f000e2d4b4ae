"""A complete small SDXL pipeline, built, saved and loaded back as a user would."""

import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionXLPipeline
from networks import (
    LATENT,
    SeededNoise,
    small_stable_diffusion,
    small_stable_diffusion_xl,
    small_vae,
)

from mgd3.backbones.codecs import VAECodec
from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.backbones.stable_diffusion_xl import StableDiffusionXL
from mgd3.backbones.weights.download import PARTS, needed_files
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import NoGuidance
from mgd3.sampling.inversion import denoiser_digest
from mgd3.sampling.samplers import DDIM, DDPM
from mgd3.sampling.terms import SamplingBatch
from mgd3.storage.repositories import HubFile

SIZE = 8 * LATENT
SHAPE = (1, 4, LATENT, LATENT)
CAT = ClassInfo("cat", "house cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("xl") / "pipeline"
    small_stable_diffusion_xl(path)
    return path


def backbone(folder, **options):
    given = {"image_size": SIZE, "output_size": SIZE // 2}
    return StableDiffusionXL(str(folder), **given | options)


@pytest.mark.parametrize("negative", ["", "cartoon"])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_samples_are_those_of_diffusers(tmp_path, kind, zeros, negative):
    small_stable_diffusion_xl(tmp_path / "pipeline", zeros)
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "pipeline", add_watermarker=False
    )
    scheduler = DDPMScheduler if kind is DDPM else DDIMScheduler
    pipeline.scheduler = scheduler.from_config(
        pipeline.scheduler.config, clip_sample=False, set_alpha_to_one=True
    )
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "house cat",
        negative_prompt=negative or None,
        guidance_scale=5.0,
        num_inference_steps=10,
        height=SIZE,
        width=SIZE,
        original_size=(48, 40),
        crops_coords_top_left=(8, 0),
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    ours = backbone(
        tmp_path / "pipeline", negative_prompt=negative, original_size=[48, 40], crop=[8, 0]
    )
    sampler = kind(10, 5.0, 4, **({"variance": "fixed"} if kind is DDPM else {}))
    out = sampler(
        ours,
        SamplingBatch(class_ids=torch.tensor(ours.class_ids([CAT])), modes=torch.zeros(SHAPE)),
        NoGuidance(),
        SeededNoise(SHAPE),
    )
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()


def noise_of(ours, row):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return ours.predict(x, torch.tensor([5]), torch.tensor([row])).eps


def test_prompts_and_sizes_reach_the_network(folder):
    ours = backbone(folder)
    assert ours.class_ids([CAT, ClassInfo("dog", "dog")]) == [1, 2]
    cat = noise_of(ours, 1)
    assert not torch.equal(cat, noise_of(ours, 2)) and not torch.equal(cat, noise_of(ours, 0))
    for options in ({"original_size": [16, SIZE]}, {"crop": [0, 4]}):
        other = backbone(folder, **options)
        other.class_ids([CAT])
        assert not torch.equal(noise_of(other, 1), cat)
    later = backbone(folder)  # rows that are encoded one after another are the same
    assert later.class_ids([ClassInfo("dog", "dog")]) + later.class_ids([CAT]) == [1, 2]
    assert torch.allclose(noise_of(later, 2), cat, atol=1e-6)


def test_sizes_are_part_of_what_caches_go_by(folder):
    plain = backbone(folder)
    before = denoiser_digest(plain)
    plain.class_ids([CAT])
    assert denoiser_digest(plain) == before
    assert denoiser_digest(backbone(folder, crop=[0, 4])) != before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"original_size": 512}, r"backbone\.original_size=512 is not \[height, width\]"),
        ({"original_size": [0, 4]}, r"backbone\.original_size=0"),
        ({"crop": [1, 2, 3]}, r"backbone\.crop=\[1, 2, 3\] is not \[top, left\]"),
        ({"crop": [0, -1]}, r"backbone\.crop=-1"),
    ],
)
def test_wrong_sizes_are_named(folder, options, message):
    with pytest.raises(UserError, match=message):
        backbone(folder, **options)


def test_what_is_no_base_model_is_refused(folder, tmp_path):
    small_stable_diffusion(tmp_path / "one")
    with pytest.raises(UserError, match=r"text_encoder_2, tokenizer_2 missing"):
        backbone(tmp_path / "one")
    with pytest.raises(UserError, match=r"SDXL is backbone=sdxl"):
        _ = StableDiffusion(str(folder), SIZE, SIZE).network
    small_stable_diffusion_xl(tmp_path / "refiner", projection_class_embeddings_input_dim=12 + 40)
    with pytest.raises(
        UserError, match=r"takes 4 numbers of pooled text.*gives 12; use a base model"
    ):
        _ = backbone(tmp_path / "refiner").network
    small_stable_diffusion_xl(tmp_path / "distilled", time_cond_proj_dim=8)
    with pytest.raises(UserError, match="is told the guidance scale"):
        _ = backbone(tmp_path / "distilled").network


def test_an_sd_unet_in_an_sdxl_folder_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "mixed")
    small_stable_diffusion(tmp_path / "one")
    shutil.rmtree(tmp_path / "mixed/unet")
    shutil.copytree(tmp_path / "one/unet", tmp_path / "mixed/unet")
    with pytest.raises(UserError, match=r"takes no pooled text; .* backbone=sd15"):
        _ = backbone(tmp_path / "mixed").network


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_an_incomplete_part_is_named(folder, tmp_path, part):
    shutil.copytree(folder, tmp_path / "spoiled")
    for file in (tmp_path / "spoiled" / part).iterdir():
        file.unlink()
    with pytest.raises(UserError, match=part):
        backbone(tmp_path / "spoiled").class_ids([CAT])


def test_a_first_stage_that_centres_its_latents_is_refused(tmp_path):
    vae = small_vae(tmp_path / "vae")
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(UserError, match="centres its latents by channel"):
        _ = VAECodec(lambda: vae, SIZE).network


def test_the_second_encoder_and_its_tokenizer_are_fetched(folder):
    files = [
        HubFile(str(path.relative_to(folder)), path.stat().st_size, None)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    ]
    assert "model_index.json" in {f.name for f in files}
    index = json.loads((folder / "model_index.json").read_text())
    parts = {part for part, value in index.items() if isinstance(value, list) and value[0]}
    fetched = {f.name.split("/")[0] for f in needed_files(files, PARTS)}
    assert fetched == parts | {"model_index.json"}

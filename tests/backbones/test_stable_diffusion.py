"""A complete small pipeline, built, saved and loaded back as a user would."""

import logging
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from networks import LATENT, SeededNoise, small_stable_diffusion, small_vae
from safetensors.torch import load_file, save_file

from mgd3.backbones.prompts import PromptTemplate
from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import ModeGuidance, NoGuidance
from mgd3.sampling.samplers import DDIM, DDPM
from mgd3.sampling.starts import PrototypeStart
from mgd3.sampling.terms import SamplingBatch

SIZE = 8 * LATENT
SHAPE = (1, 4, LATENT, LATENT)
TENCH = ClassInfo("n01440764", "tench, Tinca tinca", 0)
CAT = ClassInfo("cat", "house cat")


@pytest.fixture(scope="module", params=["epsilon", "v_prediction"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "pipeline"
    small_stable_diffusion(path, request.param)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "pipeline"
    small_stable_diffusion(path)
    return path


def backbone(folder, **options):
    return StableDiffusion(str(folder), **{"image_size": SIZE, "output_size": SIZE // 2} | options)


def test_what_a_network_is_told_is_its_prompts_and_who_reads_them(plain, tmp_path):
    def told(of, info, **options):
        own = backbone(of, **options)
        return own.told_of([*own.class_ids([info]), own.null_class])

    before = told(plain, CAT)
    assert told(plain, CAT) == before
    assert told(plain, replace(CAT, name="tame cat")) != before
    assert told(plain, CAT, negative_prompt="cartoon") != before
    other = shutil.copytree(plain, tmp_path / "other")
    assert told(other, CAT) == before
    file = next((other / "text_encoder").glob("*.safetensors"))
    save_file({k: v + 1 for k, v in load_file(file).items()}, file, {"format": "pt"})
    assert told(other, CAT) != before


@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_unguided_samples_are_those_of_diffusers(folder, kind):
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    scheduler = DDPMScheduler if kind is DDPM else DDIMScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "house cat",
        negative_prompt="cartoon",
        guidance_scale=8.0,
        num_inference_steps=10,
        height=SIZE,
        width=SIZE,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    ours = backbone(folder, negative_prompt="cartoon")
    sampler = kind(10, 8.0, 4, **({"variance": "fixed"} if kind is DDPM else {}))
    out = sampler(
        ours,
        SamplingBatch(class_ids=torch.tensor(ours.class_ids([CAT])), modes=torch.zeros(SHAPE)),
        NoGuidance(),
        SeededNoise(SHAPE),
    )
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("strength", [0.7, 0.35, 1.0])
def test_prototypes_are_denoised_as_by_diffusers_image_to_image(plain, strength):
    """D4M's synthesis, from given latents, with the same noise."""
    prototype = torch.randn(SHAPE, generator=torch.Generator().manual_seed(8))
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(plain, safety_checker=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "house cat",
        image=prototype,
        strength=strength,
        guidance_scale=8.0,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images
    ours = backbone(plain)
    out = DDIM(20, 8.0, 4)(
        ours,
        SamplingBatch(class_ids=torch.tensor(ours.class_ids([CAT])), modes=prototype),
        NoGuidance(),
        SeededNoise(SHAPE),
        start=PrototypeStart(strength),
    )
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()


class CountingGuidance(ModeGuidance):
    steps: tuple = ()

    def bind(self, batch):
        term = super().bind(batch)

        def counted(state):
            g_t = term(state)
            self.steps += (state.step,) * bool(g_t.abs().sum())
            return g_t

        return counted


def test_the_first_25_of_50_steps_are_guided(plain):
    schedule = backbone(plain).schedule.respaced(50)
    guidance = CountingGuidance(0.1, stop_t=24)
    ours = backbone(plain)
    DDPM(50, 8.0, 4, variance="fixed")(
        ours,
        SamplingBatch(class_ids=torch.tensor(ours.class_ids([CAT])), modes=torch.ones(SHAPE)),
        guidance,
        SeededNoise(SHAPE),
    )
    assert [schedule.timesteps[s] for s in guidance.steps] == list(range(981, 500, -20))
    assert schedule.abar[[49, 25]].tolist() == pytest.approx([0.005776, 0.2750], rel=1e-3)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{name}", "tench"),
        ("{synonyms}", "tench, Tinca tinca"),
        ("a photo of a {name} ({wnid})", "a photo of a tench (n01440764)"),
    ],
)
def test_prompts(template, expected):
    assert PromptTemplate(template)(TENCH) == expected


def test_each_prompt_is_encoded_once_and_row_0_is_the_negative(plain):
    ours = backbone(plain, negative_prompt="cartoon")
    assert ours.class_ids([TENCH, CAT, TENCH]) == [1, 2, 1]
    assert ours.class_ids([CAT]) == [2]
    assert ours.prompt_ids(["a cat asleep", "house cat", "cartoon"]) == [3, 2, 0]
    x, t = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([5])
    null = ours.predict(x, t, torch.tensor([ours.null_class])).eps
    same = backbone(plain, prompt="cartoon")
    assert torch.equal(same.predict(x, t, torch.tensor(same.class_ids([CAT]))).eps, null)
    assert not torch.equal(ours.predict(x, t, torch.tensor([1])).eps, null)


def test_latents_are_drawn_for_each_image_of_its_own(plain):
    codec = backbone(plain).codec
    images = torch.rand(1, 3, SIZE, SIZE).expand(2, -1, -1, -1) * 2 - 1
    first, second = codec.encode(images, ["a", "b"])
    assert not torch.equal(first, second)
    assert torch.allclose(codec.encode(images[:1], ["b"])[0], second, atol=1e-6)
    mean = backbone(plain, latents="mean").codec
    assert mean.id != codec.id
    spread = (first - mean.encode(images[:1], ["a"])[0]) / 0.18215
    posterior = mean.network.encode(images[:1]).latent_dist
    assert (spread / posterior.std).std().item() == pytest.approx(1, abs=0.25)


def test_a_long_prompt_is_cut_and_the_cut_is_named(plain, caplog):
    with caplog.at_level(logging.WARNING):
        backbone(plain, prompt="x" * 75 + "lost").class_ids([CAT])
    assert "takes 75; cut off: 'lost'" in caplog.text


def spoiled(plain, tmp_path, *parts):
    shutil.copytree(plain, tmp_path / "spoiled")
    for part in parts:
        shutil.rmtree(tmp_path / "spoiled" / part)
    return tmp_path / "spoiled"


def test_a_pipeline_without_its_vae_is_refused_or_given_one(plain, tmp_path):
    folder = spoiled(plain, tmp_path, "vae")
    with pytest.raises(UserError, match=r"vae missing; backbone\.vae=FOLDER"):
        backbone(folder)
    small_vae(tmp_path / "vae")
    assert backbone(folder, vae=str(tmp_path / "vae")).latent_shape == SHAPE[1:]


@pytest.mark.parametrize(
    ("part", "use"),
    [
        ("unet", lambda b: b.network),
        ("vae", lambda b: b.codec.downsampling),
        ("text_encoder", lambda b: b.class_ids([CAT])),
        ("tokenizer", lambda b: b.class_ids([CAT])),
        ("scheduler", lambda b: b.schedule),
    ],
)
def test_an_incomplete_part_is_named(plain, tmp_path, part, use):
    folder = spoiled(plain, tmp_path)
    for file in (folder / part).iterdir():
        file.unlink()
    with pytest.raises(UserError, match=part):
        use(backbone(folder))


def test_half_of_a_networks_tensors_are_refused(plain, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = spoiled(plain, tmp_path)
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing \(conv_in\.bias\)"):
        _ = backbone(folder).network


def test_half_precision_files_are_read(plain, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(plain, safety_checker=None)
    pipeline.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    half = backbone(tmp_path / "half")
    assert half.network.dtype == torch.float32
    assert half.class_ids([CAT]) == [1]


def test_other_kinds_of_pipelines_are_refused(tmp_path):
    small_stable_diffusion(tmp_path / "inpainting", in_channels=9)
    with pytest.raises(UserError, match="takes 9 channels, its latents have 4"):
        _ = backbone(tmp_path / "inpainting").network
    small_stable_diffusion(tmp_path / "direct", prediction_type="sample")
    with pytest.raises(UserError, match=r"'sample' is unknown.*epsilon, v_prediction"):
        _ = backbone(tmp_path / "direct").schedule


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "a {colour}"}, r"\{colour\} is unknown; allowed: \{name\}"),
        ({"prompt": "a {name"}, r"is no template"),
        ({"latents": "mode"}, r"backbone\.latents='mode' is unknown"),
        ({"output_size": 0}, r"backbone\.output_size=0"),
    ],
)
def test_wrong_options_are_named(plain, options, message):
    with pytest.raises(UserError, match=message):
        backbone(plain, **options)


def test_an_image_size_between_two_latents_is_refused(plain):
    with pytest.raises(UserError, match=r"image_size=60 is not a multiple of 8.*56 and 64"):
        _ = backbone(plain, image_size=60).latent_shape

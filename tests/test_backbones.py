"""Weights in every form that a user may have, and forms that must be refused."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiTTransformer2DModel
from safetensors.torch import save_file
from test_parity import GOLDEN

from mgd3.backbones.checkpoints import read_weights
from mgd3.backbones.codecs import PixelCodec, make_codec
from mgd3.backbones.dit import DiT
from mgd3.backbones.dit_weights import (
    build_network,
    constructor_arguments,
    from_original,
    to_original,
)
from mgd3.datasets import ClassInfo, Digits
from mgd3.discovery import Work
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.guidance import ModeGuidance
from mgd3.modes import KMeansModes
from mgd3.samplers import DDPM
from mgd3.types import UserError

KEYS = ["a", "b"]
DIGITS = "mgd3/weights/dit_digits.safetensors"
ORIGINAL = GOLDEN / "dit_mode_guidance.pt"


def small_vae(tmp_path):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4] * 4,
        norm_num_groups=2,
        latent_channels=4,
    ).eval()
    vae.save_pretrained(tmp_path / "vae")
    return vae


def golden_dit(weights, tmp_path):
    if not (tmp_path / "vae").exists():
        small_vae(tmp_path)
    return DiT(str(weights), vae=str(tmp_path / "vae"), image_size=64, num_heads=4)


@torch.inference_mode()
def test_original_and_diffusers_weights_are_one_network(tmp_path):
    original = golden_dit(ORIGINAL, tmp_path)
    port = DiTTransformer2DModel.from_config(
        original.bare.network.config
    )  # as the hub's: no shared part
    port.load_state_dict(original.bare.network.state_dict())
    port.save_pretrained(tmp_path / "pipeline/transformer")
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    ids = torch.tensor([0, 4, original.null_class])
    expected = original.predict(x, t, ids)
    shutil.copytree(tmp_path / "pipeline/transformer", tmp_path / "alone")
    for folder in (tmp_path / "pipeline", tmp_path / "alone"):
        out = golden_dit(folder, tmp_path).predict(x, t, ids)
        assert (out.eps - expected.eps).abs().max() < 1e-5
        assert (out.variance - expected.variance).abs().max() < 1e-5


def test_a_training_checkpoint_gives_its_average(tmp_path):
    tensors, _ = read_weights("w", ORIGINAL)
    torch.save({"model": {}, "ema": tensors, "opt": {}}, tmp_path / "train.pt")
    assert torch.equal(
        golden_dit(tmp_path / "train.pt", tmp_path).bare.network.proj_out_2.weight,
        tensors["final_layer.linear.weight"],
    )


def test_export_and_import_are_inverse():
    torch.manual_seed(0)
    network = build_network(
        input_size=8,
        patch_size=2,
        in_channels=1,
        hidden_size=32,
        depth=2,
        num_heads=2,
        num_classes=5,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter)
    again = from_original(to_original(network), num_heads=2)
    state = again.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert json.loads(constructor_arguments(again))["num_classes"] == 5


def _truncate(path, out):
    out.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


def _drop(path, out):
    tensors, _ = read_weights("w", path)
    tensors = dict(tensors)
    del tensors["blocks.1.mlp.fc1.bias"]
    torch.save(tensors, out)


def _extra(path, out):
    tensors, _ = read_weights("w", path)
    torch.save({**tensors, "blocks.1.gamma": torch.ones(3)}, out)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, "not a readable weight file"),
        (lambda path, out: torch.save({"x": Payload()}, out), "not a readable weight file"),
        (lambda path, out: torch.save({"a": torch.ones(1)}, out), "not a DiT checkpoint"),
        (_drop, r"1 missing \(transformer_blocks\.1\.ff\.net\.0\.proj\.bias\)"),
        (_extra, r"1 unknown \(blocks\.1\.gamma\)"),
    ],
)
def test_bad_weight_files_are_refused(tmp_path, capsys, spoil, message):
    spoil(ORIGINAL, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=message):
        _ = golden_dit(tmp_path / "bad.pt", tmp_path).bare
    assert "never run" not in capsys.readouterr().out


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    save_file({"x": torch.ones(100)}, tmp_path / "w.safetensors")
    _truncate(tmp_path / "w.safetensors", tmp_path / "half.safetensors")
    with pytest.raises(UserError, match="not a readable weight file"):
        read_weights("backbone.weights", tmp_path / "half.safetensors")


def test_a_wrong_image_size_is_named(tmp_path):
    small_vae(tmp_path)
    dit = DiT(str(ORIGINAL), vae=str(tmp_path / "vae"), image_size=256, num_heads=4)
    with pytest.raises(UserError, match=r"set backbone\.image_size=64"):
        _ = dit.bare


def test_vae_latents_are_the_scaled_mean(tmp_path):
    vae = small_vae(tmp_path)
    codec = make_codec(str(tmp_path / "vae"), 64)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        expected = vae.encode(images).latent_dist.mean * 0.18215
        assert torch.allclose(codec.encode(images, KEYS), expected, atol=1e-5)
        decoded = vae.decode(expected / 0.18215).sample
    assert torch.allclose(codec.decode(expected), decoded, atol=1e-4)
    assert codec.id == make_codec(str(tmp_path / "vae"), 64).id
    assert codec.id != make_codec(str(tmp_path / "vae"), 128).id


def test_tiny_autoencoder_is_a_codec_too(tmp_path):
    torch.manual_seed(0)
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).eval()
    tiny.save_pretrained(tmp_path / "pipe/vae")
    codec = make_codec(str(tmp_path / "pipe"), 64)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(codec.encode(images, KEYS), tiny.encode(images).latents)
    shutil.rmtree(tmp_path / "pipe/vae")
    (tmp_path / "pipe/vae").mkdir()
    with pytest.raises(UserError, match=r"backbone\.vae"):
        make_codec(str(tmp_path / "pipe"), 64).encode(images, KEYS)


def test_classes_find_their_rows(tmp_path):
    imagenet = golden_dit(ORIGINAL, tmp_path)
    assert imagenet.class_ids([ClassInfo("n1", "x", 7), ClassInfo("n0", "y", 3)]) == [7, 3]
    with pytest.raises(UserError, match="first 10 classes"):
        imagenet.class_ids([ClassInfo("n2", "z", 217)])
    with pytest.raises(UserError, match="does not know the class 'cat'"):
        imagenet.class_ids([ClassInfo("cat", "cat")])
    own = DiT(DIGITS, vae=None, image_size=8)
    assert own.class_ids([ClassInfo("7", "x"), ClassInfo("0", "y")]) == [7, 0]
    assert isinstance(own.codec, PixelCodec)
    with pytest.raises(UserError, match="was trained on 0, 1, 2"):
        own.class_ids([ClassInfo("n01440764", "tench", 0)])


def test_pixels_agree_between_batch_sizes(tmp_path):
    """The shipped network, real modes: at most one grey level apart at 1, 7 and all at once."""
    dataset, pictures = Digits(8), {}
    for size in (1, 7, 20):
        distiller = GenerativeDistiller(
            DiT(DIGITS, vae=None, image_size=8),
            DDPM(steps=8, cfg_scale=4.0, cfg_channels=3),
            ModeGuidance(0.1, 4),
            KMeansModes(random_state=0, n_init=1, max_iter=300, tol=1e-4),
            Work(cache=tmp_path / "cache", batch_size=size, workers=1, flip="none"),
        )
        out = distiller.distill(dataset, 2, 0, tmp_path / str(size), {"method": "m", "config": {}})
        pictures[size] = torch.stack(
            [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i, _ in out.images()]
        ).int()
    for size in (1, 7):
        assert (pictures[size] - pictures[20]).abs().max() <= 1


class BadNetwork(DiT):
    def predict(self, x_t, t, class_ids):
        out = super().predict(x_t, t, class_ids)
        out.eps[0] = float("nan")
        return out


def test_nan_in_a_sample_is_an_error_and_writes_nothing(tmp_path):
    distiller = GenerativeDistiller(
        BadNetwork(DIGITS, vae=None, image_size=8),
        DDPM(steps=2, cfg_scale=4.0, cfg_channels=3),
        ModeGuidance(0.1, 0),
        KMeansModes(random_state=0, n_init=1, max_iter=300, tol=1e-4),
        Work(cache=tmp_path / "cache", batch_size=10, workers=1, flip="none"),
    )
    with pytest.raises(UserError, match="class 0, image 0 is not finite"):
        distiller.distill(Digits(8), 1, 0, tmp_path / "out", {})
    assert not list(tmp_path.rglob("*.png"))

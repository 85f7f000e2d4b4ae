"""Codecs: images to latents and back, as diffusers does it."""

import shutil

import pytest
import torch
from networks import small_tiny_autoencoder, small_vae

from mgd3.backbones.codecs import make_codec
from mgd3.runtime.errors import UserError

KEYS = ["a", "b"]


def test_vae_latents_are_the_scaled_mean(tmp_path):
    vae = small_vae(tmp_path / "vae")
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
    tiny = small_tiny_autoencoder(tmp_path / "pipe/vae")
    codec = make_codec(str(tmp_path / "pipe"), 64)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        assert torch.allclose(codec.encode(images, KEYS), tiny.encode(images).latents)
    shutil.rmtree(tmp_path / "pipe/vae")
    (tmp_path / "pipe/vae").mkdir()
    with pytest.raises(UserError, match=r"backbone\.vae"):
        make_codec(str(tmp_path / "pipe"), 64).encode(images, KEYS)

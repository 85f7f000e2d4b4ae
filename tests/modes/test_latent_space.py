"""Latents as a feature space: the codec's own, real ones from the cache of mode discovery."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from support import composed

from mgd3.backbones.codecs import VAECodec
from mgd3.config.build import build_space
from mgd3.data.digits import Digits
from mgd3.data.inventory import take_inventory
from mgd3.modes.latent_space import LatentFeatures
from mgd3.runtime.errors import UserError


@pytest.fixture
def cfg(tmp_path):
    return composed(
        "+metrics=vae_latents", "backbone=toy", f"cache={tmp_path}", "compute.device=cpu"
    )


def test_latents_are_the_codecs_flattened(cfg, tmp_path):
    """The toy backbone's latents are grey values in [-1, 1]."""
    dataset = Digits(8)
    inventory = take_inventory(dataset, "train", 1, tmp_path, 1)
    space = build_space(cfg, "metrics").fit(dataset, inventory)
    image = inventory[3].images[0].decode()
    grey = np.asarray(image, dtype=np.float32).mean(axis=2) / 127.5 - 1
    expected = torch.from_numpy(grey).flatten()
    real = space.real(3)
    assert real.shape == (len(inventory[3].images), 64)
    assert torch.allclose(real[0], expected, atol=1e-6)
    features, logits = space([image, Image.new("RGB", (24, 16), (255, 255, 255))])
    assert torch.equal(features[0], real[0])
    assert torch.allclose(features[1], torch.ones(64)) and logits.shape == (2, 0)


def test_drawn_latents_are_refused(tmp_path):
    drawn = SimpleNamespace(codec=VAECodec(lambda: None, 8, latents="sample"))
    with pytest.raises(UserError, match=r"posterior means; set backbone\.latents=mean"):
        LatentFeatures(drawn, tmp_path)

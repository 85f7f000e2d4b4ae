"""Features of a block are those that a hook of the whole network sees, and carry a gradient."""

import pytest
import torch
from networks import compvis_tensors, small_stable_diffusion, small_stable_diffusion_xl

from mgd3.backbones.dit import DiT
from mgd3.backbones.ldm import LDM
from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.backbones.stable_diffusion_xl import StableDiffusionXL
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime.errors import UserError

CLASSES = (ClassInfo("n01440764", "tench"), ClassInfo("n01443537", "goldfish"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    torch.save({"state_dict": compvis_tensors()}, folder / "model.ckpt")
    small_stable_diffusion(folder / "sd")
    small_stable_diffusion_xl(folder / "sdxl")
    return folder


MADE = {
    "dit": lambda w: DiT("mgd3/backbones/weights/dit_digits.safetensors", None, 8, num_heads=4),
    "ldm": lambda w: LDM(str(w / "model.ckpt"), 64, cache=w),
    "sd": lambda w: StableDiffusion(str(w / "sd"), 64, 32),
    "sdxl": lambda w: StableDiffusionXL(str(w / "sdxl"), 64, 32),
}


def layer(backbone, block):
    if isinstance(backbone, DiT):
        return backbone.bare.network.transformer_blocks[block - 1], backbone.bare.network.proj_out_2
    return backbone.network.mid_block, backbone.network.conv_out


@pytest.mark.parametrize(
    ("name", "block"),
    [("dit", 1), ("dit", 2), ("dit", 6), ("ldm", 1), ("sd", 1), ("sdxl", 1)],
)
def test_features_are_what_the_whole_network_computes(weights, name, block):
    backbone = MADE[name](weights)
    shape = backbone.latent_shape
    if name in ("sd", "sdxl"):
        backbone.class_ids(CLASSES)
    x_t = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t, ids = torch.tensor([5, 400, 900]), torch.tensor([0, 1, 1])
    inside, last = layer(backbone, block)
    seen, ends = [], []
    inside.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    last.register_forward_hook(lambda module, given, out: ends.append(out))
    with torch.no_grad():
        backbone.predict(x_t, t, ids)
    expected = seen[0] if name == "dit" else seen[0].flatten(2).transpose(1, 2)
    found = backbone.features(x_t, t, ids, block)
    assert len(ends) == 1  # nothing after the block was run for them
    assert found.shape == expected.shape and torch.allclose(found, expected, atol=1e-6)
    (slope,) = torch.autograd.grad(found[0].square().sum(), x_t)
    assert slope[0].abs().max() > 0 and not slope[1:].any()
    assert not backbone.predict(x_t.detach(), t, ids).eps.requires_grad  # no hook stays


def test_blocks_that_are_not_there_are_refused(weights):
    x_t, t, ids = torch.zeros(1, 1, 8, 8), torch.tensor([5]), torch.tensor([0])
    for name, blocks in (("dit", 6), ("ldm", 1)):
        backbone = MADE[name](weights)
        assert backbone.feature_blocks == blocks
        for block in (0, blocks + 1):
            with pytest.raises(UserError, match=rf"block.*={block} is out of range"):
                backbone.features(x_t, t, ids, block)

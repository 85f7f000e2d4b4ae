"""Weights cast once instead of in every forward pass: autocast's results, bit for bit."""

import copy

import pytest
import torch
from networks import small_tiny_autoencoder, small_vae
from support import GOLDEN

from mgd3.backbones.codecs import make_codec
from mgd3.backbones.dit import BareDiT, DiT
from mgd3.backbones.weights.dit_weights import from_original
from mgd3.finetuning.phases import overwrite
from mgd3.runtime.compute import Compute
from mgd3.storage.checkpoints import read_weights

DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"
TYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dit(name, compute):
    if name == "digits":
        return DiT(DIGITS, vae=None, image_size=8, compute=compute).bare
    tensors, _ = read_weights("weights", GOLDEN / "dit_mode_guidance.pt")
    return BareDiT(compute.place(from_original(tensors, num_heads=4)), compute)


def inputs(backbone, rows=5):
    draw = torch.Generator().manual_seed(0)
    x_t = torch.randn(rows, *backbone.latent_shape, generator=draw)
    return x_t, torch.arange(rows) * 200, torch.arange(rows)


def predicted(backbone, *given):
    with torch.inference_mode():
        made = backbone.predict(*given)
    return torch.cat([made.eps, made.variance], dim=1)


def by_autocast(backbone, x_t, t, class_ids):
    """diffusers' own pass over float32 weights: cast in each layer, embedded in each block."""
    dtype = TYPES[backbone.precision]
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        return backbone.network(x_t, timestep=t, class_labels=class_ids).sample.float()


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", ["digits", "golden"])
def test_predictions_are_autocasts_before_and_after_other_weights_are_put_in(name, precision):
    backbone = dit(name, Compute(device="cpu", precision=precision))
    given = inputs(backbone)
    first = predicted(backbone, *given)
    assert torch.equal(first, by_autocast(backbone, *given))
    before = copy.deepcopy(backbone.network.state_dict())
    overwrite(backbone.network, {k: 1.1 * v for k, v in before.items()})
    assert torch.equal(predicted(backbone, *given), by_autocast(backbone, *given))
    overwrite(backbone.network, before)
    assert torch.equal(predicted(backbone, *given), first)
    assert {p.dtype for p in backbone.network.parameters()} == {torch.float32}


def test_gradients_reach_the_latents_through_held_weights():
    backbone = dit("digits", Compute(device="cpu", precision="bfloat16"))
    x_t, t, class_ids = inputs(backbone)
    x_t.requires_grad_()
    backbone.predict(x_t, t, class_ids).eps.square().sum().backward()
    assert x_t.grad.abs().sum() > 0


@pytest.mark.parametrize("make", [small_vae, small_tiny_autoencoder])
def test_decoding_is_autocasts_and_encoding_and_the_caches_key_stay(make, tmp_path):
    make(tmp_path)
    plain, half = (
        make_codec(str(tmp_path), 64, compute=Compute(device="cpu", precision=precision))
        for precision in ("float32", "bfloat16")
    )
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    decoded = half.decode(latents)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scaled = latents / plain.network.config.scaling_factor
        assert torch.equal(decoded, plain.network.decode(scaled).sample.float())
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(half.encode(images, "ab"), plain.encode(images, "ab"))
    assert half.id == plain.id


def test_timesteps_and_classes_are_embedded_once():
    backbone = dit("golden", Compute(device="cpu"))
    calls = []
    embedder = backbone.network.transformer_blocks[0].norm1.emb
    embedder.timestep_embedder.register_forward_hook(lambda *_: calls.append(1))
    predicted(backbone, *inputs(backbone))
    assert len(calls) == 1
    by_autocast(backbone, *inputs(backbone))  # as training goes through it
    assert len(calls) == 2 + len(backbone.network.transformer_blocks)


def test_blocks_with_embedders_of_their_own_keep_them():
    """As in weights that somebody fine-tuned in diffusers' layout."""
    from diffusers import DiTTransformer2DModel

    from mgd3.backbones.weights.dit_weights import as_trained

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, num_embeds_ada_norm=10,
    )  # fmt: skip
    as_trained(network)
    compute = Compute(device="cpu")
    backbone = BareDiT(compute.place(network), compute)
    first, second = (b.norm1.emb.class_embedder for b in network.transformer_blocks)
    assert first is not second
    given = inputs(backbone)
    assert torch.equal(predicted(backbone, *given), by_autocast(backbone, *given))

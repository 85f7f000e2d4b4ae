"""DiT: weights in every form are one network, and what its samples must be."""

import json
import shutil

import pytest
import torch
from networks import ORIGINAL, golden_dit, save_as_the_hub, small_vae
from safetensors.torch import load_file, save_file

from mgd3.backbones.codecs import PixelCodec
from mgd3.backbones.dit import DiT
from mgd3.backbones.weights.dit_weights import (
    build_network,
    constructor_arguments,
    from_original,
    to_original,
)
from mgd3.data.class_lists import ClassInfo
from mgd3.data.digits import Digits
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.modes.finders import KMeansModes
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import ModeGuidance
from mgd3.sampling.samplers import DDPM, classifier_free, classifier_free_pair
from mgd3.storage.checkpoints import read_weights

DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"


@torch.inference_mode()
def test_original_and_diffusers_weights_are_one_network(tmp_path):
    original = golden_dit(ORIGINAL, tmp_path)
    save_as_the_hub(original, tmp_path / "pipeline")
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999])
    ids = torch.tensor([0, 4, original.null_class])
    expected = original.predict(x, t, ids)
    shutil.copytree(tmp_path / "pipeline/transformer", tmp_path / "alone")
    for folder in (tmp_path / "pipeline", tmp_path / "alone"):
        out = golden_dit(folder, tmp_path).predict(x, t, ids)
        assert (out.eps - expected.eps).abs().max() < 1e-5
        assert (out.variance - expected.variance).abs().max() < 1e-5


def test_the_hubs_older_configuration_is_the_same_network(tmp_path):
    """The published repository was written before the class had a name of its own."""
    original = golden_dit(ORIGINAL, tmp_path)
    save_as_the_hub(original, tmp_path / "old")
    path = tmp_path / "old/transformer/config.json"
    config = json.loads(path.read_text())
    del config["norm_eps"]
    config |= {"_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0"}
    path.write_text(json.dumps(config | {"num_vector_embeds": None, "cross_attention_dim": None}))
    x, t, ids = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 2])
    out = golden_dit(tmp_path / "old", tmp_path).predict(x, t, ids).eps
    assert (out - original.predict(x, t, ids).eps).abs().max() < 1e-5


@pytest.mark.parametrize("missing", ["proj_out_2.bias", "transformer_blocks.0.ff.net.2.weight"])
def test_a_diffusers_folder_with_a_tensor_missing_is_refused(tmp_path, missing):
    save_as_the_hub(golden_dit(ORIGINAL, tmp_path), tmp_path / "less")
    path = tmp_path / "less/transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors[missing]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=rf"1 missing \({missing}\)"):
        _ = golden_dit(tmp_path / "less", tmp_path).bare


@torch.inference_mode()
def test_guidance_on_three_or_four_channels(tmp_path):
    """cfg_channels=4 is eps_null + w (eps_cond - eps_null) on all of them; 3 leaves the last."""
    dit = golden_dit(ORIGINAL, tmp_path)
    x, t, ids = torch.randn(2, 4, 8, 8), torch.tensor([500, 500]), torch.tensor([1, 2])
    cond = dit.predict(x, t, ids)
    null = dit.predict(x, t, torch.full_like(ids, dit.null_class))
    all_guided = null.eps + 4 * (cond.eps - null.eps)
    for channels in (3, 4):
        out, twin = classifier_free_pair(dit, x, t, ids, 4.0, channels)
        alone = classifier_free(dit, x, t, ids, 4.0, channels)
        assert torch.equal(alone.eps, out.eps) and torch.equal(alone.variance, out.variance)
        expected = torch.cat([all_guided[:, :channels], cond.eps[:, channels:]], dim=1)
        assert (out.eps - expected).abs().max() < 1e-5
        assert (out.variance - cond.variance).abs().max() < 1e-5
        expected = torch.cat([all_guided[:, :channels], null.eps[:, channels:]], dim=1)
        assert (twin.eps - expected).abs().max() < 1e-5
        assert (twin.variance - null.variance).abs().max() < 1e-5


def test_a_published_width_with_other_heads_is_refused_unless_the_file_says_so(tmp_path):
    network = build_network(8, 2, 1, hidden_size=384, depth=1, num_heads=4, num_classes=3)
    torch.save(to_original(network), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"384 wide, a DiT with 6 heads, not 16.*num_heads=6"):
        _ = DiT(str(tmp_path / "w.pt"), vae=None, image_size=8).bare
    metadata = {"config": constructor_arguments(network)}
    save_file(to_original(network), tmp_path / "w.safetensors", metadata)
    own = DiT(str(tmp_path / "w.safetensors"), vae=None, image_size=8)
    assert own.bare.network.config.num_attention_heads == 4


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


def test_a_wrong_image_size_is_named(tmp_path):
    small_vae(tmp_path / "vae")
    dit = DiT(str(ORIGINAL), vae=str(tmp_path / "vae"), image_size=256, num_heads=4)
    with pytest.raises(UserError, match=r"set backbone\.image_size=64"):
        _ = dit.bare


def test_latents_of_other_channels_are_named_before_anything_is_encoded():
    dit = DiT(str(ORIGINAL), vae=None, image_size=8, num_heads=4)
    with pytest.raises(UserError, match=r"latents of 4 channels, and pixels .*null\) has 1; give"):
        _ = dit.bare


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
            KMeansModes(),
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
        KMeansModes(),
        Work(cache=tmp_path / "cache", batch_size=10, workers=1, flip="none"),
    )
    with pytest.raises(UserError, match="class 0, image 0 is not finite"):
        distiller.distill(Digits(8), 1, 0, tmp_path / "out", {})
    assert not list(tmp_path.rglob("*.png"))

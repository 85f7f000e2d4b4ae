"""CompVis's latent diffusion checkpoints: what is read, what is kept, what is refused."""

import pickle

import pytest
import torch
from networks import compvis_tensors

from mgd3.backbones.ldm import LDM
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime.errors import UserError

X, T = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16), torch.tensor([1, 801])


def ldm(path, tensors=None, cache=None, **options):
    if tensors is not None:
        torch.save({"state_dict": tensors, "global_step": 3}, path)
    return LDM(str(path), image_size=64, cache=cache or path.parent / "cache", **options)


def test_sizes_schedule_and_classes_come_from_the_checkpoint(tmp_path):
    tensors = compvis_tensors()
    backbone = ldm(tmp_path / "model.ckpt", tensors)
    assert backbone.latent_shape == (3, 16, 16)
    assert backbone.codec.downsampling == 4
    assert backbone.null_class == 10
    assert torch.equal(backbone.schedule.alphas_cumprod.float(), tensors["alphas_cumprod"])
    assert backbone.schedule.timesteps(50) == list(range(1, 1000, 20))
    assert backbone.class_ids([ClassInfo("n2", "x", 7)]) == [7]
    with pytest.raises(UserError, match="first 10 classes and does not know the class 'n3'"):
        backbone.class_ids([ClassInfo("n3", "x", 12)])
    a, b = (backbone.predict(X, T, torch.tensor([k, 10])).eps for k in (1, 2))
    assert not torch.equal(a[0], b[0])
    assert torch.allclose(a[1], b[1], atol=1e-5)


def test_the_conversion_is_done_once(tmp_path):
    first = ldm(tmp_path / "model.ckpt", compvis_tensors()).predict(X, T, torch.tensor([0, 1])).eps
    (kept,) = (tmp_path / "cache/weights").glob("*.safetensors")
    stamp = kept.stat().st_mtime_ns
    assert torch.equal(ldm(tmp_path / "model.ckpt").predict(X, T, torch.tensor([0, 1])).eps, first)
    assert kept.stat().st_mtime_ns == stamp
    kept.write_bytes(kept.read_bytes()[:-7])
    assert torch.equal(ldm(tmp_path / "model.ckpt").predict(X, T, torch.tensor([0, 1])).eps, first)


def test_averaged_weights_are_taken_where_there_are_some(tmp_path):
    prefix, tensors = "model.diffusion_model.", compvis_tensors()
    averaged = {
        f"model_ema.diffusion_model{k.removeprefix(prefix).replace('.', '')}": 0.5 * v
        for k, v in tensors.items()
        if k.startswith(prefix)
    }
    half = {k: 0.5 * v if k.startswith(prefix) else v for k, v in tensors.items()}
    expected = ldm(tmp_path / "half.ckpt", half).predict(X, T, torch.tensor([0, 1])).eps
    out = ldm(tmp_path / "ema.ckpt", tensors | averaged).predict(X, T, torch.tensor([0, 1])).eps
    assert torch.equal(out, expected)


class Callback:
    """What a training framework leaves in a checkpoint; must never be called when one is read."""

    def __init__(self):
        self.state = {"best": 1}

    def __reduce__(self):
        return (print, ("this must never run",), {"path": "x"})


def test_objects_beside_the_tensors_are_not_run(tmp_path, capsys):
    content = {
        "state_dict": compvis_tensors(),
        "callbacks": {Callback: Callback()},
        "optimizer_states": [Callback()],
    }
    torch.save(content, tmp_path / "model.ckpt")
    assert ldm(tmp_path / "model.ckpt").null_class == 10
    torch.save(content, tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert ldm(tmp_path / "old.ckpt").null_class == 10
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(Callback()))
    with pytest.raises(UserError, match="not a readable weight file"):
        _ = ldm(tmp_path / "evil.ckpt").null_class
    assert "never run" not in capsys.readouterr().out


def _without(*names):
    return {k: v for k, v in compvis_tensors().items() if k not in names}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"a": torch.ones(1)},
            r"not a class-conditional latent diffusion checkpoint .* start with: a",
        ),
        (_without("alphas_cumprod"), "alphas_cumprod missing"),
        (_without("model.diffusion_model.out.2.bias"), r"1 missing \(conv_out\.bias\)"),
        (_without("first_stage_model.decoder.norm_out.bias"), r"decoder\.conv_norm_out\.bias"),
        (
            compvis_tensors() | {"model.diffusion_model.label_emb.weight": torch.ones(2)},
            r"1 unknown tensors \(model\.diffusion_model\.label_emb\.weight\)",
        ),
        (compvis_tensors() | {"discriminator.bias": torch.ones(2)}, r"1 unknown \(discrim"),
        (
            compvis_tensors() | {"cond_stage_model.embedding.weight": torch.ones(11, 5)},
            "5 columns of the class embedding, 8 are needed",
        ),
        (
            compvis_tensors() | {"alphas_cumprod": torch.ones(500)},
            "500 timesteps of alphas_cumprod, 1000 are needed",
        ),
        (
            compvis_tensors() | {"first_stage_model.quantize.embedding.weight": torch.ones(5)},
            "of no size that can be built",
        ),
        (
            compvis_tensors() | {"model.diffusion_model.time_embed.2.bias": torch.ones(5)},
            r"of another shape \(time_embedding\.linear_2\.bias is \(5,\), not \(128,\)\)",
        ),
    ],
)
def test_other_checkpoints_are_refused(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message):
        backbone = ldm(tmp_path / "model.ckpt", tensors)
        _ = backbone.null_class


def test_an_image_size_that_the_first_stage_cannot_halve_is_refused(tmp_path):
    torch.save({"state_dict": compvis_tensors()}, tmp_path / "model.ckpt")
    with pytest.raises(
        UserError, match=r"backbone\.image_size=66 is not a multiple of 4.*64 and 68"
    ):
        _ = LDM(str(tmp_path / "model.ckpt"), image_size=66, cache=tmp_path).latent_shape


def test_a_missing_file_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"fetch_weights\.py ldm_cin256"):
        ldm(tmp_path / "model.ckpt")
    url = "https://example.org/none/model.ckpt"
    with pytest.raises(UserError, match=f"fetch_weights.py source={url}.*backbone.weights=PATH"):
        LDM(url, image_size=64)

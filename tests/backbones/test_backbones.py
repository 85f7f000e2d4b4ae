"""Weights in every form that a user may have, and forms that must be refused."""

import argparse
import io
import json
import pickle
import shutil
import sys
import tarfile
import warnings
import zipfile
from collections import defaultdict, deque
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from networks import small_tiny_autoencoder, small_vae
from safetensors.torch import load_file, save_file
from support import GOLDEN

from mgd3.backbones.codecs import PixelCodec, make_codec
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
from mgd3.sampling.samplers import DDPM, classifier_free
from mgd3.storage.checkpoints import read_weights

KEYS = ["a", "b"]
DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"
ORIGINAL = GOLDEN / "dit_mode_guidance.pt"


def golden_dit(weights, tmp_path):
    if not (tmp_path / "vae").exists():
        small_vae(tmp_path / "vae")
    return DiT(str(weights), vae=str(tmp_path / "vae"), image_size=64, num_heads=4)


def save_as_the_hub(dit, folder):
    """The hub's networks share no part between blocks."""
    port = DiTTransformer2DModel.from_config(dit.bare.network.config)
    port.load_state_dict(dit.bare.network.state_dict())
    port.save_pretrained(folder / "transformer")


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
    null = dit.predict(x, t, torch.full_like(ids, dit.null_class)).eps
    all_guided = null + 4 * (cond.eps - null)
    for channels in (3, 4):
        out = classifier_free(dit, x, t, ids, 4.0, channels)
        expected = torch.cat([all_guided[:, :channels], cond.eps[:, channels:]], dim=1)
        assert (out.eps - expected).abs().max() < 1e-5
        assert (out.variance - cond.variance).abs().max() < 1e-5


def test_a_published_width_with_other_heads_is_refused_unless_the_file_says_so(tmp_path):
    network = build_network(8, 2, 1, hidden_size=384, depth=1, num_heads=4, num_classes=3)
    torch.save(to_original(network), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"384 wide, a DiT with 6 heads, not 16.*num_heads=6"):
        _ = DiT(str(tmp_path / "w.pt"), vae=None, image_size=8).bare
    metadata = {"config": constructor_arguments(network)}
    save_file(to_original(network), tmp_path / "w.safetensors", metadata)
    own = DiT(str(tmp_path / "w.safetensors"), vae=None, image_size=8)
    assert own.bare.network.config.num_attention_heads == 4


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


class Program(torch.nn.Module):
    """Prints as soon as torch takes the file for what it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> bool:
        return self.training

    @torch.jit.export
    def __setstate__(self, state: bool) -> None:
        print("this must never run")
        self.training = state


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The bytes of a TorchScript archive."""
    path = tmp_path_factory.mktemp("program") / "program.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.script(Program()).save(str(path))
    return path.read_bytes()


def refused(path, capfd, message="not a readable weight file"):
    """One `UserError` that names key and file, and nothing has run."""
    with pytest.raises(UserError, match=message) as caught:
        read_weights("backbone.weights", path)
    assert f"backbone.weights={path} is not a readable weight file" in str(caught.value)
    out = capfd.readouterr()
    assert "never run" not in out.out + out.err


@pytest.mark.filterwarnings("ignore:.*torch.jit.load.*:FutureWarning")
def test_the_program_would_print(program, tmp_path, capfd):
    (tmp_path / "program.pt").write_bytes(program)
    torch.jit.load(tmp_path / "program.pt")
    out = capfd.readouterr()
    assert "never run" in out.out + out.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda program: program, "TorchScript program"),
        (lambda program: program + b"PK\x05\x06", "TorchScript program"),
        (lambda program: program + b"PK\x05\x06" + bytes(18), "not a readable"),
        (lambda program: program + b"more", "not a readable"),
        (lambda program: b"more" + program, "begins with b'morePK"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors", ""])
def test_a_program_is_not_taken_for_weights(program, tmp_path, capfd, change, message, suffix):
    path = tmp_path / f"program{suffix}"
    path.write_bytes(change(program))
    refused(path, capfd, message)


@pytest.mark.parametrize("end", [0, 3, 4, 30, 200, 0.25, 0.5, 0.9, -500, -200, -22, -5, -1])
def test_a_truncated_program_is_refused(program, tmp_path, capfd, end):
    (tmp_path / "w.pt").write_bytes(program[: int(end * len(program)) if 0 < end < 1 else end])
    refused(tmp_path / "w.pt", capfd)


APPENDED = (b"", b"\0", b"PK\x05\x06", b"PK\x05\x06" + bytes(18), b"PK\x03\x04", b"more" * 99)


def containers(folder):
    """Weights in every container, and pickles that call, each with the suffixes it may have."""
    weights = {"w": torch.arange(6.0).view(2, 3)}
    save_file(weights, folder / "a.safetensors")
    torch.save(weights, folder / "a.pt")
    torch.save(weights, folder / "older.pt", _use_new_zipfile_serialization=False)
    torch.save({"w": Payload()}, folder / "call.pt")
    torch.save({"w": Payload()}, folder / "olderc.pt", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["a.safetensors", "a.pt", "older.pt", "call.pt", "olderc.pt", "program.pt"]
)
def test_truncated_and_lengthened_files_give_their_tensors_or_one_message(
    program, tmp_path, capfd, name
):
    (tmp_path / "whole").mkdir()
    content = {"program.pt": program, **containers(tmp_path / "whole")}[name]
    path = tmp_path / name
    ends = {*range(0, 40), *range(len(content) - 40, len(content) + 1)}
    ends |= set(range(0, len(content), max(1, len(content) // 60)))
    for end in sorted(ends):
        for more in APPENDED if end == len(content) else (b"", b"PK\x05\x06" + bytes(18)):
            path.write_bytes(content[:end] + more)
            try:
                tensors, _ = read_weights("backbone.weights", path)
            except UserError as error:
                assert f"backbone.weights={path} is not a readable weight file" in str(error)
                continue
            assert name in ("a.safetensors", "a.pt", "older.pt"), (end, more)
            patched = end < len(content) and more  # as long as before, with other bytes at its end
            assert patched or tensors["w"].flatten().tolist() == [0, 1, 2, 3, 4, 5], (end, more)
    out = capfd.readouterr()
    assert "never run" not in out.out + out.err


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["program", "pickle"])
def test_a_program_in_a_folder_of_diffusers_is_not_run(program, tmp_path, capfd, kind):
    save_as_the_hub(golden_dit(ORIGINAL, tmp_path), tmp_path / "dit")
    (tmp_path / "dit/transformer/diffusion_pytorch_model.safetensors").unlink()
    weights = tmp_path / "dit/transformer/diffusion_pytorch_model.bin"
    torch.save(Payload(), weights) if kind == "pickle" else weights.write_bytes(program)
    with pytest.raises(UserError, match="could not be loaded"):
        _ = golden_dit(tmp_path / "dit", tmp_path).bare
    out = capfd.readouterr()
    assert "never run" not in out.out + out.err


@pytest.mark.parametrize("name", ["DiffusionPipeline", "ModelMixin", "os.system", None])
def test_a_configuration_names_none_but_the_models_that_are_loaded_here(tmp_path, name):
    save_as_the_hub(golden_dit(ORIGINAL, tmp_path), tmp_path / "dit")
    path = tmp_path / "dit/transformer/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": name}))
    with pytest.raises(UserError, match=r"names no model that this project loads .*allowed"):
        _ = golden_dit(tmp_path / "dit", tmp_path).bare


def test_whole_numbers_are_no_weights(tmp_path):
    save_file({"w": torch.ones(2, dtype=torch.int8)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"w is quantised .*give float weights"):
        read_weights("backbone.weights", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"config": "[]"}, "its metadata's config: its content is"),
        ({"config": '{"num_heads": 0}'}, "metadata's config: num_heads is 0"),
        ({"config": '{"num_heads": 5}'}, "not a multiple of num_heads=5"),
        ({"config": "{"}, "metadata's config is no JSON"),
        ({"classes": "5"}, "metadata's classes: its content is"),
        ({"classes": '["a"]'}, "its metadata names 1 classes, its network has"),
    ],
)
def test_bad_metadata_is_named(tmp_path, metadata, message):
    tensors, _ = read_weights("w", ORIGINAL)
    save_file(tensors, tmp_path / "w.safetensors", metadata)
    with pytest.raises(UserError, match=message):
        _ = DiT(str(tmp_path / "w.safetensors"), vae=None, image_size=8, num_heads=4).bare


def _tar(path):
    """The oldest format of torch, a tar archive of pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            body = pickle.dumps(Payload(), 2)
            entry = tarfile.TarInfo(name)
            entry.size = len(body)
            archive.addfile(entry, io.BytesIO(body))


def _older(content):
    return lambda path: torch.save(content(), path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: torch.save(Payload(), path),
        lambda path: torch.save({"ema": Payload()}, path),
        lambda path: torch.save({"ema": {"x": Payload()}}, path),
        lambda path: torch.save([torch.ones(1)], path),
        _older(lambda: Payload()),
        _older(lambda: {"x": torch.ones(1), "y": Payload()}),
        _tar,
        *[lambda path, p=p: path.write_bytes(pickle.dumps(Payload(), p)) for p in range(6)],
        lambda path: path.write_bytes(b"cos\nsystem\n(S'echo this must never run'\ntR."),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
def test_a_pickle_that_calls_is_refused(tmp_path, capfd, write):
    write(tmp_path / "w.pt")
    refused(tmp_path / "w.pt", capfd)


class Attributes(dict):
    """Lightning keeps hyperparameters in such a class."""


class Sequence(list):
    pass


class Slots:
    __slots__ = ("a",)


def foreign_objects():
    slots, attributes = Slots(), Attributes(lr=1)
    slots.a, attributes.note = 1, "x"
    counts = defaultdict(list, {"a": [1]})
    return {
        "args": argparse.Namespace(path=Path("x"), call=Payload(), kinds={Slots, int}),
        "callbacks": {Payload: Payload(), Slots: slots},
        "others": [attributes, Sequence([1, 2]), counts, deque([1]), Fraction(1, 2), np.float64(3)],
    }


@pytest.mark.parametrize("older", [False, True])
def test_objects_of_foreign_frameworks_are_dropped(tmp_path, capfd, older):
    tensors, _ = read_weights("w", ORIGINAL)
    content = {"ema": tensors} | foreign_objects()
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not older)
    known = torch.serialization.get_safe_globals()
    read, metadata = read_weights("w", tmp_path / "w.pt")
    assert metadata == {} and list(read) == list(tensors)
    assert all(torch.equal(read[k], v) for k, v in tensors.items())
    assert torch.serialization.get_safe_globals() == known
    assert "never run" not in capfd.readouterr().out


def test_a_module_that_a_checkpoint_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "foreign_kind.py").write_text("class Kind:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import foreign_kind

    torch.save({"ema": {"x": torch.ones(1)}, "args": foreign_kind.Kind()}, tmp_path / "w.pt")
    del sys.modules["foreign_kind"]
    assert list(read_weights("w", tmp_path / "w.pt")[0]) == ["x"]
    assert "foreign_kind" not in sys.modules


def test_a_compressed_zip_gives_its_values(tmp_path):
    torch.save({"x": torch.arange(10000)}, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as plain,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in plain.namelist():
            compressed.writestr(name, plain.read(name))
    tensors, _ = read_weights("w", tmp_path / "small.pt")
    assert torch.equal(tensors["x"], torch.arange(10000))


def test_a_file_named_code_is_no_program(tmp_path):
    """torch names the folder inside the archive after the file."""
    torch.save({"x": torch.ones(1)}, tmp_path / "code.pt")
    assert list(read_weights("w", tmp_path / "code.pt")[0]) == ["x"]


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


def _drop(path, out):
    tensors, _ = read_weights("w", path)
    tensors = dict(tensors)
    del tensors["blocks.1.mlp.fc1.bias"]
    torch.save(tensors, out)


def _change(name, change):
    def spoil(path, out):
        tensors = dict(read_weights("w", path)[0])
        tensors[name] = change(tensors[name]).clone()
        torch.save(tensors, out)

    return spoil


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
        (
            _change("pos_embed", lambda t: t[..., :1]),
            r"pos_embed is \(1, 16, 1\), not \(1, 16, 64\)",
        ),
        (_change("pos_embed", lambda t: t[:, :3]), r"pos_embed is \(1, 3, 64\)"),
        (_change("pos_embed", lambda t: t[0, 0]), "not a DiT checkpoint"),
        (_change("blocks.0.attn.qkv.weight", lambda t: t[:2]), "2 rows, not three equal parts"),
        (_change("blocks.0.mlp.fc1.bias", lambda t: t[:2]), r"bias is \(2,\), not \(256,\)"),
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
    small_vae(tmp_path / "vae")
    dit = DiT(str(ORIGINAL), vae=str(tmp_path / "vae"), image_size=256, num_heads=4)
    with pytest.raises(UserError, match=r"set backbone\.image_size=64"):
        _ = dit.bare


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

"""Checkpoints as they are found on the web, and files that are something else than weights."""

import gzip
import io
import json
import logging
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import compvis_tensors, small_vae
from safetensors.torch import load_file, save_file

from mgd3.backbones.dit import DiT
from mgd3.backbones.ldm import LDM
from mgd3.backbones.weights.sources import load_pretrained
from mgd3.runtime.errors import UserError
from mgd3.storage.checkpoints import read_weights

DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"
X, T, IDS = (
    torch.linspace(-2, 2, 128).view(2, 1, 8, 8),
    torch.tensor([3, 900]),
    torch.tensor([1, 2]),
)
POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def tensors(scale=1.0):
    return {"a.weight": torch.arange(6.0) * scale, "b.bias": torch.ones(2, dtype=torch.bfloat16)}


def under(prefix, content):
    return {prefix + name: value for name, value in content.items()}


def equal(found, expected):
    return list(found) == list(expected) and all(
        found[k].dtype == v.dtype and torch.equal(found[k], v) for k, v in expected.items()
    )


def read(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    return read_weights("backbone.weights", tmp_path / "w.pt")[0]


@pytest.mark.parametrize(
    "name",
    [
        "ema", "state_dict", "model", "model_state_dict", "module", "network", "net", "generator",
        "model_ema", "ema_model", "state_dict_ema", "params", "of_its_own",
    ],
)  # fmt: skip
def test_the_one_network_of_a_checkpoint_is_taken_and_said(tmp_path, caplog, name):
    content = {"epoch": 3, name: tensors(), "optimizer": {"state": {0: tensors()}}, "loss": 0.5}
    with caplog.at_level(logging.INFO):
        assert equal(read(content, tmp_path), tensors())
    expected = f"w.pt: «{name}» is taken of epoch, {name}, optimizer, loss"
    assert [m.split("/")[-1] for m in caplog.messages] == [expected]


@pytest.mark.parametrize("nothing", [None, {}, False, 0.9999])
def test_an_empty_ema_gives_way_to_the_model(tmp_path, nothing):
    assert equal(read({"ema": nothing, "model": tensors(2)}, tmp_path), tensors(2))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("ema", "model"), ("ema", "state_dict"), ("ema", "model_ema"), ("model_ema", "model"),
        ("state_dict_ema", "state_dict"), ("state_dict", "model"), ("generator", "discriminator"),
    ],
)  # fmt: skip
def test_the_average_comes_first_wherever_it_stands(tmp_path, first, then):
    assert equal(read({then: tensors(2), first: tensors()}, tmp_path), tensors())
    assert equal(read({first: tensors(), then: tensors(2)}, tmp_path), tensors())


@pytest.mark.parametrize("names", [("model", "generator"), ("encoder", "decoder"), ("G", "D", "M")])
def test_several_networks_without_an_order_are_named(tmp_path, names):
    with pytest.raises(UserError, match=rf"several networks: {', '.join(names)}\); save the one"):
        read({"step": 1} | {name: tensors() for name in names}, tmp_path)


class Average:
    """A framework's object around averaged weights."""

    def __init__(self):
        self.shadow = tensors()


@pytest.mark.parametrize("name", ["ema", "state_dict", "model"])
@pytest.mark.parametrize(
    "value",
    [{"decay": 0.9, "shadow": tensors()}, {**tensors(), "n": 1}, [torch.ones(1)], Average()],
)
def test_a_network_that_cannot_be_read_is_not_passed_over(tmp_path, name, value):
    with pytest.raises(UserError, match=f"its «{name}» holds something else than tensors"):
        read({name: value, "weights": tensors()}, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "holds no dictionary of tensors"),
        ({}, "no tensors alone: nothing"),
        ({"w": torch.ones(1), "epoch": 3}, r"no tensors alone: w, epoch\); save the network"),
        ({n: 1 for n in "abcdefghijk"}, r"no tensors alone: a, b, c, d, e, f, g, h, …\)"),
        ({"optimizer": {"state": {0: tensors()}}}, "no tensors alone: optimizer"),
    ],
)
def test_a_file_without_a_network_is_refused_by_what_it_holds(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(content, tmp_path)
    assert "truncated" not in str(caught.value)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "model._orig_mod.module."]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_wrappers_put_before_all_names_is_left_off(tmp_path, caplog, prefix, suffix):
    path = tmp_path / f"w{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(under(prefix, tensors()), path)
    with caplog.at_level(logging.INFO):
        assert equal(read_weights("w", path)[0], tensors())
    assert caplog.messages == [f"w={path}: «{prefix}» is left off all names"]


def test_prefixes_of_some_names_stay(tmp_path, caplog):
    mixed = under("module.", tensors()) | {"step": torch.ones(1)}
    with caplog.at_level(logging.INFO):
        assert equal(read(mixed, tmp_path), mixed)
        assert equal(read({"module.": torch.ones(1)}, tmp_path), {"module.": torch.ones(1)})
    assert not caplog.messages


def test_files_of_ours_keep_names_values_and_silence(caplog):
    with caplog.at_level(logging.INFO):
        assert equal(read_weights("w", Path(DIGITS))[0], load_file(DIGITS))
    assert not caplog.messages


@torch.inference_mode()
def test_a_wrapped_checkpoint_is_the_same_dit(tmp_path):
    expected = DiT(DIGITS, vae=None, image_size=8).predict(X, T, IDS)
    heads = DiT(DIGITS, vae=None, image_size=8).bare.network.config.num_attention_heads
    wrapped = {"ema": None, "model": under("module._orig_mod.", load_file(DIGITS)), "epoch": 1}
    torch.save(wrapped, tmp_path / "w.pt")
    out = DiT(str(tmp_path / "w.pt"), None, 8, num_heads=heads).predict(X, T, IDS)
    assert torch.equal(out.eps, expected.eps) and torch.equal(out.variance, expected.variance)


@torch.inference_mode()
def test_a_wrapped_compvis_checkpoint_is_the_same_ldm(tmp_path, caplog):
    plain, x = compvis_tensors(), torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    outputs = []
    for name, content in (("plain", plain), ("wrapped", under("module.", plain))):
        torch.save({"state_dict": content, "global_step": 3}, tmp_path / f"{name}.ckpt")
        with caplog.at_level(logging.INFO, "mgd3.storage.checkpoints"):
            caplog.clear()
            ldm = LDM(str(tmp_path / f"{name}.ckpt"), image_size=64, cache=tmp_path / name)
            outputs.append(ldm.predict(x, T, IDS).eps)
        assert ("«module.» is left off" in caplog.text) == (name == "wrapped")
    assert torch.equal(*outputs)


@torch.inference_mode()
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ""])
def test_a_safetensors_file_is_one_by_any_name(tmp_path, suffix):
    path = shutil.copy(DIGITS, tmp_path / f"w{suffix}")
    tensors, metadata = read_weights("w", path)
    assert equal(tensors, load_file(DIGITS)) and "config" in metadata
    out = DiT(str(path), vae=None, image_size=8).predict(X, T, IDS)
    assert torch.equal(out.eps, DiT(DIGITS, vae=None, image_size=8).predict(X, T, IDS).eps)


@pytest.mark.parametrize("is_zip", [True, False])
def test_what_torch_saved_is_read_by_any_name(tmp_path, is_zip):
    for suffix in (".safetensors", ".bin", ""):
        path = tmp_path / f"w{suffix}"
        torch.save({"ema": tensors()}, path, _use_new_zipfile_serialization=is_zip)
        found, metadata = read_weights("w", path)
        assert equal(found, tensors()) and metadata == {}


class Payload:
    def __reduce__(self):
        return (print, ("this must never run",))


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_that_calls_is_refused_as_safetensors_too(tmp_path, capfd, is_zip):
    path = tmp_path / "w.safetensors"
    torch.save({"w": Payload()}, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(UserError, match="not a readable weight file"):
        read_weights("w", path)
    out = capfd.readouterr()
    assert "never run" not in out.out + out.err


def _packed(mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        entry = tarfile.TarInfo("model.pt")
        entry.size = len(POINTER)
        archive.addfile(entry, io.BytesIO(POINTER))
    return buffer.getvalue()


def _zipped(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, POINTER)
    return buffer.getvalue()


def _numpy(save):
    buffer = io.BytesIO()
    save(buffer, np.ones(3))
    return buffer.getvalue()


LOGIN = b"\xef\xbb\xbf\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
PICKLED = pickle.dumps({"weight": [0.5] * 99}, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"\(it is empty\); fetch it again"),
        (b"PK\x03", r"\(it has no more than 3 bytes\); fetch it again"),
        (bytes(4096), r"begins with zeros, .*\); fetch it again"),
        (
            POINTER,
            rf"Git-LFS pointer of {len(POINTER)} bytes, .*\); run git lfs pull .*or fetch it",
        ),
        (LOGIN, r"an HTML page\); .*sign in: fetch the file itself"),
        (b"<html>" + b"x" * 4096, "an HTML page"),
        (b'<?xml version="1.0"?><Error/>', r"a text that begins '<\?xml version"),
        (b"Entry not found", r"a text that begins 'Entry not found'\); give a safetensors file"),
        ("é".encode() * 999, "a text that begins 'éé"),
        (json.dumps({"weight_map": {}}).encode(), r"a JSON text\); give the weight file"),
        (b"\n [1, 2]\n" * 99, "a JSON text"),
        (gzip.compress(POINTER), r"a gzip archive\); unpack it"),
        (_packed("w:gz"), r"a gzip archive\); unpack it"),
        (_packed("w:bz2"), r"a bzip2 archive\); unpack it"),
        (_packed("w:xz"), r"an xz archive\); unpack it"),
        (_packed("w"), r"a tar archive\); unpack it"),
        (_zipped("folder/model.ckpt"), r"a zip archive that torch.save did not write\); unpack"),
        (_numpy(np.save), r"a Numpy array\); save its tensors as safetensors"),
        (_numpy(np.savez), r"a Numpy archive\); save its tensors as safetensors"),
        (PICKLED, r"a pickle, but not as torch.save writes one\); save its tensors"),
        (pickle.dumps([1, 2], 0), "a pickle, but not as torch.save writes one"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file"),
        (b"GGUF" + bytes(600), "a GGUF file"),
        (b"\xff\xd8\xff\xe0 a photo", r"begins with b'.*', as no weight file does\); give a safe"),
    ],
)
@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
def test_another_file_is_named_with_what_to_do(tmp_path, content, message, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_weights("backbone.weights", path)
    text = str(caught.value)
    assert text.startswith(f"backbone.weights={path} is not a readable weight file (it ")
    assert "truncated" not in text and "pickled code" not in text


def test_truncated_files_are_said_to_be_so(tmp_path):
    save_file(tensors(), tmp_path / "a.safetensors")
    torch.save(tensors(), tmp_path / "a.pt")
    for name, more in (
        ("a.safetensors", "or was altered: fetch"),
        ("a.pt", "or hold pickled code"),
    ):
        path, whole = tmp_path / name, (tmp_path / name).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UserError, match=f"truncated {more}"):
            read_weights("w", path)


def test_what_the_disk_refuses_is_not_the_contents_fault(tmp_path):
    with pytest.raises(UserError, match=r"\(Is a directory\); see that it is there"):
        read_weights("w", tmp_path)


def test_a_pointer_in_a_clone_of_a_hub_repository_is_named(tmp_path):
    small_vae(tmp_path / "vae")
    (path,) = (tmp_path / "vae").rglob("*.safetensors")
    path.write_bytes(POINTER)
    with pytest.raises(UserError, match=f"vae: {path} is not .*Git-LFS pointer .*lfs pull"):
        load_pretrained("backbone.vae", str(tmp_path / "vae"), "vae")

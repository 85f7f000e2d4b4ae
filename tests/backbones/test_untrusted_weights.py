"""Weight files from anybody: nothing in them is run, and what cannot be read is named."""

import argparse
import io
import json
import pickle
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
from networks import ORIGINAL, golden_dit, save_as_the_hub
from safetensors.torch import save_file

from mgd3.backbones.dit import DiT
from mgd3.runtime.errors import UserError
from mgd3.storage.checkpoints import read_weights


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

"""Files are whole or absent, and the file system's refusals are explained."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load

from mgd3.runtime import checks
from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.storage.documents import read_document
from mgd3.storage.files import (
    exclusive,
    nothing_left_behind,
    read_json,
    refuse_links,
    remove_leftovers,
    whole_file,
    write_atomic,
    write_json,
)
from mgd3.storage.repositories import talking
from mgd3.storage.tensors import tensor_bytes


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "deep/file"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*file: the disk is full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [f.name for f in path.parent.iterdir()] == ["file"]


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(UserError, match=r"a file is in the way"):
        write_atomic(tmp_path / "taken/file", b"x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="no permission"):
        write_atomic(tmp_path / "file", b"x")


def test_one_holder_at_a_time(tmp_path):
    with (
        exclusive(tmp_path / "run"),
        pytest.raises(UserError, match="another process"),
        exclusive(tmp_path / "run"),
    ):
        pass
    with exclusive(tmp_path / "run"):
        pass


def test_a_refused_run_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs/a/b"
    (tmp_path / "mine").touch()

    def fails(run_dir, error=UserError, runs=Path("runs"), meanwhile=nullcontext):
        run_dir.mkdir(parents=True, exist_ok=True)
        with pytest.raises(error), nothing_left_behind(run_dir, runs), meanwhile():
            for name in ("run.log", ".run.lock"):
                (run_dir / name).touch()
            raise error("no")

    for error in (UserError, ZeroDivisionError, KeyboardInterrupt):
        fails(run_dir, error)
        assert [f.name for f in tmp_path.iterdir()] == ["mine"]
    elsewhere = tmp_path.parent / f"{tmp_path.name} elsewhere"
    fails(elsewhere / "a/b", runs=elsewhere)
    assert list(elsewhere.iterdir()) == []
    with ExitStack() as held:
        fails(run_dir, meanwhile=lambda: nullcontext(held.enter_context(exclusive(run_dir))))
        assert run_dir.is_dir()  # somebody's, who has begun since
    fails(run_dir)
    assert run_dir.is_dir()  # somebody's, who has begun before
    shutil.rmtree(run_dir)
    fails(run_dir, meanwhile=lambda: nullcontext((run_dir / "images").mkdir()))
    assert (run_dir / "images").is_dir()


def test_links_are_found_at_any_depth_and_files_that_are_none_are_not_read(tmp_path):
    (tmp_path / "a/wandb").mkdir(parents=True)
    (tmp_path / "a/wandb/latest").symlink_to(tmp_path)
    refuse_links(tmp_path)
    (tmp_path / "a/b").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"a/b is a link, and links below .* are not followed"):
        refuse_links(tmp_path)
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(CorruptFileError, match="it is no file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(UserError, match="it is no file"):
        read_document(tmp_path / "x.json", dict, "remove it")


def test_what_dead_writers_left_is_cleared_and_what_is_being_written_stays(tmp_path):
    deep = tmp_path / "a/b"
    deep.mkdir(parents=True)
    dead = deep / ".x.json.abcd1234.mgd3.tmp"
    dead.write_text("half")
    mine = [tmp_path / ".notes.tmp", tmp_path / "x.mgd3.tmp"]
    for path in mine:
        path.write_text("a user's")
    with whole_file(deep / "x.json") as file:
        file.write(b"{")
        file.flush()
        apart = "from pathlib import Path; from mgd3.storage.files import remove_leftovers;"
        code = f"{apart} remove_leftovers(Path({str(tmp_path)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        remove_leftovers(tmp_path)
        file.write(b"}")
    assert (deep / "x.json").read_text() == "{}" and not dead.exists()
    assert all(path.exists() for path in mine) and len(list(deep.iterdir())) == 1


def test_a_leftover_beside_is_cleared_without_going_deeper(tmp_path):
    for folder in (tmp_path, tmp_path / "a"):
        folder.mkdir(exist_ok=True)
        (folder / ".x.abcd1234.mgd3.tmp").touch()
    remove_leftovers(tmp_path, deep=False)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert len(list((tmp_path / "a").iterdir())) == 1


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """safetensors itself writes its metadata in another order every time."""
    metadata = {name: name for name in "hgfedcba"}
    first = tensor_bytes({"w": torch.ones(3)}, metadata)
    assert all(tensor_bytes({"w": torch.ones(3)}, metadata) == first for _ in range(20))
    assert load(first)["w"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def refuses(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.raises(UserError, match="a file system without locks"), exclusive(tmp_path):
        pass
    write_atomic(tmp_path / "x", b"1")  # which needs none
    assert (tmp_path / "x").read_bytes() == b"1"


def test_what_a_file_system_refuses_is_said_with_what_to_do(tmp_path):
    with pytest.raises(UserError, match="the name is too long for this file system"):
        write_json(tmp_path / ("x" * 300), {})
    with pytest.raises(UserError, match="a folder is in the way of a file"):
        (tmp_path / "d/x").mkdir(parents=True)
        write_json(tmp_path / "d", {})
    with pytest.raises(UserError, match="no such place can be made; choose another folder"):
        write_json(Path("/proc/nothing/x"), {})
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "a\nb", "a\0b", "\x1b[31m", "x" * 101]
)
def test_names_that_lead_elsewhere_are_none(name):
    with pytest.raises(UserError, match=r"key=.* is no name; allowed"):
        checks.name("key", name)


@pytest.mark.parametrize(
    "name", ["tench", "English springer", "n01440764", "..a", "été", "a|b <c>"]
)
def test_names_of_people_are_names(name):
    assert checks.name("key", name) == name


@pytest.mark.parametrize("token", ["hf_abcdef", "hf_abc\x07def"])
def test_an_error_that_shows_a_token_is_told_without_it(token, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", token)
    header = f"Bearer {token}".encode()
    with pytest.raises(UserError) as error, talking("me/set could not be fetched"):
        raise ValueError(f"Illegal header value {header!r}")
    assert "Illegal header value b'Bearer …'" in str(error.value)

"""Files are whole or absent, and the file system's refusals are explained."""

import errno
import os

import pytest

from mgd3.runtime.errors import UserError
from mgd3.storage.files import exclusive, nothing_left_behind, write_atomic


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
    run_dir.mkdir(parents=True)
    (run_dir / "run.log").touch()
    (tmp_path / "mine").touch()
    with pytest.raises(UserError), nothing_left_behind(run_dir):
        raise UserError("no")
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]
    (run_dir / "images").mkdir(parents=True)
    with pytest.raises(UserError), nothing_left_behind(run_dir):
        raise UserError("no")
    assert (run_dir / "images").is_dir()

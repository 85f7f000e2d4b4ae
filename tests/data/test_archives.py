"""Public archives from a local server: fetched once, checked, unpacked safely or not at all."""

import hashlib
import os
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import run
from support import packed, small_archive

from mgd3.data.class_lists import read_class_list
from mgd3.data.datasets import ImageTree
from mgd3.data.layouts import archives
from mgd3.data.layouts.archives import ARCHIVES, data_folder, fetch_archive, find_archive
from mgd3.runtime.errors import UserError

WNIDS = [c.wnid for c in read_class_list("imagenette")]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves what `content` holds; hangs up in the middle of the first `drops` answers."""

    class Handler(BaseHTTPRequestHandler):
        content, drops, asked = b"", 0, 0

        def do_GET(self):
            kind = type(self)
            kind.asked += 1
            start = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", str(len(kind.content) - start))
            self.end_headers()
            body = kind.content[start:]
            if kind.drops:
                kind.drops -= 1
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    monkeypatch.setenv("MGD3_ARCHIVES", f"http://127.0.0.1:{http.server_port}")
    monkeypatch.setenv("MGD3_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MGD3_WEIGHTS", str(tmp_path / "weights"))
    yield Handler
    http.shutdown()
    http.server_close()


def known(monkeypatch, name="imagenette", **changes):
    """The archive's entry, for the bytes that the local server has."""
    monkeypatch.setitem(ARCHIVES, name, replace(ARCHIVES[name], gigabytes=1e-6, **changes))


def serve(server, monkeypatch, content):
    server.content = content
    known(monkeypatch, md5=hashlib.md5(content).hexdigest())


def test_the_first_use_fetches_and_the_next_finds(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, small_archive())
    server.drops = 1
    values = {"name": "imagenette", "class_list": "imagenette", "root": None, "student_size": 16,
              "archive": "imagenette"}  # fmt: skip
    with pytest.raises(UserError, match=r"not in .*data: «python scripts/fetch_data.py imag"):
        ImageTree(**values)
    assert server.asked == 0
    dataset = ImageTree(**values, download=True)
    assert "restored from fast.ai's archive" in dataset.note
    assert [len(dataset.images(s, 3)) for s in ("train", "val")] == [2, 2]
    asked = server.asked
    assert asked == 2  # one connection was dropped
    assert ImageTree(**values).root == dataset.root == find_archive("imagenette", data_folder())
    assert server.asked == asked
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == [
        ".imagenette2.lock", ".lock", "imagenette2",
    ]  # fmt: skip


def test_the_command_fetches_ahead(server, monkeypatch, tmp_path):
    serve(server, monkeypatch, small_archive())
    done = run(tmp_path, "name=imagenette", script="scripts/fetch_data.py")
    assert done.returncode == 0, done.stderr
    assert "imagenette: " in done.stdout and "GB" in done.stdout
    unknown = run(tmp_path, "imagenet", script="scripts/fetch_data.py")
    assert unknown.returncode == 1 and "Did you mean imagenette?" in unknown.stderr


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenette", "has the MD5 [0-9a-f]{32}, not 0000.*thrown away$"),
        ("imagewoof", r"not 0000.*comes from a public loader.*fetch_data.py imagewoof md5=HEX"),
    ],
)
def test_other_bytes_are_named_with_both_digests(server, monkeypatch, tmp_path, name, message):
    server.content = small_archive()
    known(monkeypatch, name, md5="0" * 32)
    with pytest.raises(UserError, match=message):
        fetch_archive(name, data_folder(), patience=0.001)
    assert not [p for p in (tmp_path / "data").iterdir() if ".lock" not in p.name]


def _link(kind, name="imagenette2/train/x"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize(
    "member",
    [
        ("../outside", b"x"), ("/outside", b"x"), ("imagenette2/../../outside", b"x"),
        ("other/file", b"x"), _link(tarfile.SYMTYPE), _link(tarfile.LNKTYPE),
        _link(tarfile.CHRTYPE), _link(tarfile.FIFOTYPE),
    ],
    ids=["above", "absolute", "back", "beside", "symlink", "hardlink", "device", "fifo"],
)  # fmt: skip
def test_a_hostile_archive_writes_nothing(server, monkeypatch, tmp_path, member):
    serve(server, monkeypatch, packed(("imagenette2/train/a/a.JPEG", b"x"), member))
    with pytest.raises(UserError, match="which is no file or folder below imagenette2/"):
        fetch_archive("imagenette", data_folder(), patience=0.001)
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {p.name for p in left} <= {
        ".imagenette2.lock", ".lock", "imagenette2.tgz", "digests.json", ".digests.lock",
    }  # fmt: skip
    assert find_archive("imagenette", data_folder()) is None


def test_a_truncated_archive_and_a_page_are_refused(server, monkeypatch, tmp_path):
    for content in (small_archive()[:2000], b"<html>not here</html>"):
        serve(server, monkeypatch, content)
        with pytest.raises(UserError, match=r"imagenette2\.tgz cannot be read .*fetch it again"):
            fetch_archive("imagenette", data_folder(), patience=0.001)
        (tmp_path / "data/imagenette2.tgz").unlink()
        (tmp_path / "weights/digests.json").unlink()


def test_too_little_space_is_said_before_a_byte_comes(server, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "imagenette", replace(ARCHIVES["imagenette"], gigabytes=1e9))
    with pytest.raises(UserError, match=r"needs 2100000000.0 GB in .*data.* GB are free: make"):
        fetch_archive("imagenette", data_folder())
    assert server.asked == 0


def test_no_network_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("MGD3_DATA", str(tmp_path))
    monkeypatch.setenv("MGD3_ARCHIVES", "http://127.0.0.1:9")
    monkeypatch.setenv("MGD3_WEIGHTS", str(tmp_path / "w"))
    with pytest.raises(UserError, match=r"imagenette2\.tgz could not be fetched, 5 attempts"):
        fetch_archive("imagenette", data_folder(), patience=0.0001)
    monkeypatch.setenv("MGD3_ARCHIVES", "none")
    assert not archives.may_fetch()


def test_data_lie_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MGD3_DATA", str(tmp_path / "d"))
    assert archives.data_folder() == tmp_path / "d"
    monkeypatch.delenv("MGD3_DATA")
    assert archives.data_folder().name == "data" and os.path.isabs(archives.data_folder())

"""What leaves the machine: nothing, unless it was asked for; real images never by themselves."""

import os
import re
import socket
import subprocess
import sys
import threading

import pytest
from conftest import QUICK, ROOT, run
from PIL import Image

from eval import tracking
from eval.tracking import WandbTracker
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.storage.files import read_json

# Ends the process at its first connection to another machine; its helpers find a proxy instead.
GUARD = """
import os, sys
def guard(event, args):
    if event not in ("socket.connect", "socket.sendto", "socket.getaddrinfo"):
        return
    address = args[0] if event == "socket.getaddrinfo" else args[1]
    host = address[0] if isinstance(address, tuple) else address
    if isinstance(address, tuple | str) and str(host) not in ("127.0.0.1", "localhost", "::1"):
        if event == "socket.getaddrinfo" or isinstance(address, tuple):
            print("connects to", host, file=sys.stderr, flush=True)
            os._exit(99)
sys.path[:0] = FOLDERS
import conftest
sys.addaudithook(guard)
for script, *arguments in COMMANDS:
    done = conftest.run(os.getcwd(), *arguments, script=script)
    print(done.stdout)
    if done.returncode:
        sys.exit(done.stderr)
"""


@pytest.fixture
def proxy():
    """A proxy that notes who asked; environment variables send every HTTP client there."""
    asked, server = [], socket.create_server(("127.0.0.1", 0))

    def listen():
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            with client:
                client.settimeout(5)
                asked.append(client.recv(200).split(b"\r\n")[0])

    threading.Thread(target=listen, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}"
    names = [n for k in ("http_proxy", "https_proxy", "all_proxy") for n in (k, k.upper())]
    yield dict.fromkeys(names, url), asked
    server.close()


def test_nothing_leaves_the_machine_by_default(tmp_path, proxy):
    """The demo, an own folder's evaluation and a table, with an account at hand."""
    environment, asked = proxy
    quick = [o for o in QUICK if not o.startswith(("backbone", "tracker", "report"))]
    for name in "01":
        (tmp_path / "own" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "white").save(tmp_path / "own" / name / "a.png")
    commands = [
        ("run.py", "experiment=demo", "method=random,mgd3", *quick, "seed=0", "ipc=2",
         "tracker=wandb", "sampler.steps=4", "guidance.stop_t=2",
         "hydra/launcher=basic"),
        ("scripts/evaluate.py", "images=own", "dataset.classes=[0,1]", "tracker=wandb", *quick),
        ("scripts/reproduce.py", "table=5", "rehearsal=true", "only.seed=0", "only.ipc=10",
         "only.row='Random (seeded)'", "protocol.epochs_by_ipc=[[null,2]]", "tracker=wandb"),
    ]  # fmt: skip
    code = GUARD.replace("FOLDERS", repr([str(ROOT / f) for f in ("tests", "scripts")]))
    code = code.replace("COMMANDS", repr(commands))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env=os.environ | environment | {
            "HOME": str(tmp_path), "WANDB_API_KEY": "0123456789" * 4, "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "nothing is uploaded" in done.stdout
    assert done.stdout.count("recorded, not uploaded") >= 4
    assert asked == []
    assert len(list(tmp_path.rglob("offline-run-*/*.wandb"))) >= 4


def test_records_hold_no_copies_of_real_images_and_no_paths(tmp_path):
    environment = {"HOME": str(tmp_path), "WANDB_API_KEY": None, "WANDB_MODE": None}
    quick = [o for o in QUICK if not o.startswith("tracker")]
    for method, extra in (("random", []), ("random", ["tracker.real_images=true"]), ("mgd3", [])):
        runs = f"runs-{method}-{len(extra)}"
        done = run(
            tmp_path, *quick, f"method={method}", "ipc=2", *extra, "sampler.steps=4",
            "backbone.sampling.stop_t=2", f"runs={tmp_path / runs}", **environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (record,) = (tmp_path / runs).rglob("offline-run-*/*.wandb")
        pictures = list(record.parent.rglob("media/images/*.png"))
        may_leave = method == "mgd3" or bool(extra)
        assert bool(pictures) == may_leave
        content = record.read_bytes()
        (manifest,) = (tmp_path / runs).rglob("manifest.json")
        entries = read_json(manifest)["images"]
        for name in ("manifest.json", *(entry["file"] for entry in entries)):
            local = str((manifest.parent / name).relative_to(tmp_path)).encode()
            assert (local in content) == may_leave  # the artifact's files, where they are
        label = DistilledDataset(manifest.parent).label
        assert (label.encode() in content) == may_leave
        staged = (tmp_path / runs).rglob("artifacts/staging/*")
        assert not [path for path in staged if path.read_bytes()[:4] == b"\x89PNG"]
        # where tables wait to be uploaded is for the client here, and is not sent
        said = re.sub(rb"[^\s]*artifacts/staging[^\s]*", b"", content)
        assert str(tmp_path / runs).encode() not in said
        assert not list(tmp_path.glob(".*/**/*"))  # nothing below the home folder
        assert not list(record.parent.rglob("wandb-metadata.json"))


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        ({"mode": "auto"}, {}, "tracker.mode='auto' is unknown.*offline, online"),
        ({}, {"WANDB_MODE": "bogus"}, "WANDB_MODE='bogus' is unknown.*disabled, offline, online"),
        ({"mode": "online"}, {}, "needs an account"),
        ({"mode": "online"}, {"WANDB_API_KEY": "abc"}, "has 3 characters"),
        ({"mode": "online"}, {"WANDB_API_KEY": "a b\n" * 20}, "copy it again"),
        ({"real_images": "yes"}, {}, "tracker.real_images='yes' must be true or false"),
        ({"project": "a/b"}, {}, "tracker.project='a/b' is no name"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, options, environment, message):
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=message):
        WandbTracker(**{"project": "p"} | options)


def test_the_environment_keeps_a_record_at_home_but_sends_none_away(monkeypatch):
    key = "0123456789" * 4
    monkeypatch.setenv("WANDB_API_KEY", key)
    for asked, variable, mode in (
        ("offline", "online", "offline"), ("online", "offline", "offline"),
        ("online", "disabled", "disabled"), ("online", "online", "online"),
    ):  # fmt: skip
        monkeypatch.setenv("WANDB_MODE", variable)
        assert WandbTracker("p", asked).mode == mode


def test_settings_of_a_record_name_no_place():
    given = {
        "cache": "/somewhere/cache", "n": None,
        "a": {"b": ["~/x", "plain", 1, "dataset.root=/somewhere/p", "a=b"]},
    }  # fmt: skip
    assert tracking._without_places(given) == {
        "cache": "cache", "a": {"b": ["x", "plain", 1, "dataset.root=p", "a=b"]}, "n": None,
    }  # fmt: skip


class OlderTracker:
    """A user's own record, from before there were artifacts."""

    real_images = True

    def __init__(self):
        self.logged = []

    def log(self, values):
        self.logged.append(values)


def test_a_tracker_of_a_users_own_need_not_take_artifacts(tmp_path):
    tracker = OlderTracker()
    tracking.keep(tracker, "set", "dataset", {"a": tmp_path / "a"}, {})
    assert tracker.logged == []
    with tracking.NoTracker().start("id", "group", {}, tmp_path) as record:
        tracking.keep(record, "set", "dataset", {"a": tmp_path / "a"}, {})


def test_names_of_artifacts_keep_what_tells_them_apart():
    name = tracking.artifact_name(f"{'é b' * 60}-mgd3-ipc10-0123abcd")
    assert len(name) == 128 and name.endswith("b-mgd3-ipc10-0123abcd")

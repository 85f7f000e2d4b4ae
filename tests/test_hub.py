"""Publishing a set and scoring it again, against a hub on this machine."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import QUICK, run
from servers import HUB_TOKEN as TOKEN

from eval.results.rows import read_results
from mgd3.storage.files import read_json

SHORT = ("dataset=digits", "students=[convnet2_w8]", "protocol.epochs_by_ipc=[[null,2]]",
         "compute.device=cpu", "compute.workers=1")  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A set from noise and a set of real images, each scored, by name."""
    folder = tmp_path_factory.mktemp("made")
    for method in ("mgd3", "random"):
        options = ("sampler.steps=4", "backbone.sampling.stop_t=2") if method == "mgd3" else ()
        done = run(folder, *QUICK, f"method={method}", "ipc=1", f"runs={folder / 'r'}", *options)
        assert done.returncode == 0, done.stderr[-1500:]
    found = {p.parent.parent.parent.name: p.parent for p in folder.rglob("manifest.json")}
    return {name: found[name] for name in ("mgd3", "random")}


@pytest.fixture
def copied(made, tmp_path):
    return {name: Path(shutil.copytree(f, tmp_path / name)) for name, f in made.items()}


def one_line(text):
    return text.count("error:") == 1 and "Traceback" not in text


def publish(tmp_path, *options, **environment):
    return run(tmp_path, *options, script="scripts/publish.py", **environment)


def test_a_set_is_published_and_scored_elsewhere(copied, hub, tmp_path, monkeypatch):
    made = copied["mgd3"]
    (made / "images/0/extra.png").write_bytes(b"not of the set")
    hub.files["me/digits"] = {"images/old.png": b"of another set", "notes.txt": b"kept"}
    hub.private["me/digits"] = True
    done = publish(tmp_path, f"set={made}", "repo=me/digits", "license=cc-by-4.0")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.url}/datasets/me/digits"
    assert hub.tokens - {None} == {f"Bearer {TOKEN}"} and TOKEN not in done.stdout + done.stderr
    files = hub.files["me/digits"]
    images = {entry["file"] for entry in read_json(made / "manifest.json")["images"]}
    assert set(files) == images | {"README.md", "manifest.json", "notes.txt"}
    assert all(files[name] == (made / name).read_bytes() for name in images)
    assert str(tmp_path).encode() not in b"".join([*files.values(), *hub.bodies])
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    (row,) = read_results(made)
    for part in ("hard_label_short", "convnet2_w8", f"{row.top1_last:.1f}", "load_dataset("):
        assert part in card
    scored_elsewhere(row, hub, tmp_path, monkeypatch)


def scored_elsewhere(before, hub, tmp_path, monkeypatch):
    """The same row comes out; the hub's cache stays empty, and offline the set is still here."""
    there = tmp_path / "elsewhere"
    there.mkdir()
    monkeypatch.delenv("HF_TOKEN")
    images = "images=hf://me/digits@main"
    quick = [o for o in QUICK if not o.startswith(("backbone", "report"))]
    done = run(there, images, *quick, script="scripts/evaluate.py")
    assert done.returncode == 0, done.stderr[-1500:]
    (row,) = read_results(there)
    assert (row.run_id, row.top1_last) == (before.run_id, before.top1_last)
    (manifest,) = there.rglob("manifest.json")
    folder = manifest.parent
    assert folder == there / "runs/hub/me/digits" / hub.sha("me/digits")[:12]
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert not (folder / "notes.txt").exists() and not (tmp_path / "hub").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = run(there, images, script="scripts/measure.py")
    assert offline.returncode == 1 and one_line(offline.stderr)
    place = folder.relative_to(there)
    assert f"HF_HUB_OFFLINE is set; unset it; what came before is here: images={place}" in (
        offline.stderr
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    altered = next(folder.rglob("images/*/*.png"))
    altered.write_bytes(altered.read_bytes() + b"x")
    again = run(there, images, *quick, "student_seeds=2", script="scripts/evaluate.py")
    assert again.returncode == 1 and "differ from the manifest's checksums" in again.stderr
    altered.unlink()
    measured = run(there, images, *SHORT, "metrics=pixels", script="scripts/measure.py")
    assert measured.returncode == 0, measured.stderr[-1500:]
    assert altered.is_file() and (folder / "metrics-pixels-ipc1/metrics.md").is_file()


@pytest.mark.parametrize(
    ("repo", "refuses", "message"),
    [
        ("me/open", None, "me/open is public on the hub: private=false publishes the set there"),
        ("me/new", 403, "me/new could not be published: the hub refuses this account"),
        ("me/new", 500, "me/new could not be published (Server error '500"),
    ],
)
def test_what_the_hub_refuses_is_one_line(copied, hub, tmp_path, repo, refuses, message):
    hub.files["me/open"], hub.private["me/open"], hub.refuses = {}, False, refuses
    done = publish(tmp_path, f"set={copied['mgd3']}", f"repo={repo}")
    assert done.returncode == 1 and message in done.stderr
    assert one_line(done.stderr) and TOKEN not in done.stderr + done.stdout
    assert hub.commits == 0


@pytest.mark.parametrize(
    ("constants", "token", "message"),
    [
        ({"ENDPOINT": "http://127.0.0.1:9"}, TOKEN, "me/x could not be published ("),
        ({"HF_HUB_OFFLINE": True}, TOKEN, "me/x could not be published: HF_HUB_OFFLINE is set"),
        ({}, None, "publishing needs an account of the Hugging Face hub: run «hf auth login»"),
        ({}, "hf_a\tbé", "me/x could not be published ("),
    ],
)
def test_without_a_connection_or_an_account_there_is_one_line(
    copied, hub, tmp_path, monkeypatch, constants, token, message
):
    for name, value in constants.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    done = publish(tmp_path, f"set={copied['mgd3']}", "repo=me/x", HF_TOKEN=token)
    assert done.returncode == 1 and message in done.stderr
    assert one_line(done.stderr) and "hf_a" not in done.stderr and not hub.files


def test_real_images_are_published_on_demand_alone(copied, hub, tmp_path):
    options = (f"set={copied['random']}", "repo=me/real", "private=false")
    refused = run(tmp_path, *options, script="scripts/publish.py", HF_TOKEN=TOKEN)
    assert refused.returncode == 1 and "holds copies of real images" in refused.stderr
    done = publish(tmp_path, *options, "real=true")
    assert done.returncode == 0, done.stderr
    assert not hub.private["me/real"] and len(hub.files["me/real"]) == 13


def without_manifest(folder):
    (folder / "manifest.json").unlink()


def with_an_altered_image(folder):
    path = next(folder.rglob("images/*/*.png"))
    path.write_bytes(path.read_bytes() + b"x")


def without_an_image(folder):
    next(folder.rglob("images/*/*.png")).unlink()


def with_values(**values):
    def alter(folder):
        manifest = read_json(folder / "manifest.json")
        (folder / "manifest.json").write_text(json.dumps(manifest | values))

    return alter


def with_a_log_for_an_image(folder):
    manifest = read_json(folder / "manifest.json")
    (log,) = folder.rglob("run.log")
    digest = hashlib.sha256(log.read_bytes()).hexdigest()
    manifest["images"][0] |= {"file": str(log.relative_to(folder)), "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("alter", "options", "message"),
    [
        (without_manifest, (), "is not a finished distilled dataset"),
        (with_an_altered_image, (), "1 images of .* differ from the manifest's checksums"),
        (without_an_image, (), "1 images of .* are missing"),
        (with_values(elsewhere=True), (), "lie elsewhere"),
        (with_values(identity=None), (), "was made by an earlier version"),
        (with_values(config={"a": {"b": "/somewhere/x"}}), (), "machine, config.a.b='/somewhere"),
        (with_a_log_for_an_image, (), r"lists '.*run\.log'; only images/"),
        (None, ("repo=x",), "repo='x' is no repository of the hub; allowed: USER/NAME"),
        (None, ("repo=a/../b",), "is no repository of the hub"),
        (None, ("license='a: b'",), "license='a: b' is no identifier of a licence"),
        (None, ("private=maybe",), "private='maybe' must be true or false"),
    ],
)  # fmt: skip
def test_what_is_no_whole_set_of_ours_is_not_published(copied, tmp_path, alter, options, message):
    if alter:
        alter(copied["mgd3"])
    done = run(
        tmp_path, f"set={copied['mgd3']}", *(options or ("repo=me/x",)),
        *(() if not options or options[0].startswith("repo") else ("repo=me/x",)),
        script="scripts/publish.py", HF_TOKEN=TOKEN,
    )  # fmt: skip
    assert done.returncode == 1 and re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1


def test_a_bare_word_is_the_set(tmp_path):
    words = ("runs/x", "repo=me/x", "license=mit")
    done = run(tmp_path, *words, script="scripts/publish.py")
    assert done.returncode == 1 and "runs/x is not a finished" in done.stderr


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("hf://me/none", "the hub has no such repository"),
        ("hf://me/digits@v9", "the hub has no such revision"),
        ("hf://me/digits", "is no distilled dataset of this project: it has no manifest.json"),
        ("hf://digits", "is no repository of the hub; allowed: USER/NAME"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(hub, tmp_path, images, message):
    hub.files["me/digits"], hub.private["me/digits"] = {"data.csv": b"x"}, False
    done = run(
        tmp_path, f"images={images}", "dataset=digits", "compute.device=cpu",
        script="scripts/evaluate.py",
    )  # fmt: skip
    assert done.returncode == 1 and message in done.stderr
    assert one_line(done.stderr)
    assert not list(tmp_path.rglob("runs/hub/**/*.json"))

"""Downloads against real servers on this machine: dropped, truncated, altered, offline."""

import hashlib
import json
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import apart, run
from networks import compvis_tensors, small_stable_diffusion
from servers import Server, weights_hub
from support import GOLDEN

from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.backbones.weights.download import HubFile, needed_files
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime.errors import UserError
from mgd3.storage.digests import sha256_of
from mgd3.storage.fetched import download_path
from mgd3.storage.transfers import _Redirects, fetch_url, trust

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def test_a_dropped_connection_goes_on_where_it_stopped(tmp_path):
    with Server({"/w.bin": CONTENT}, stop_after=300_000, times=3) as server:
        fetch_url(f"{server.url}/w.bin", tmp_path / "w.bin", patience=0.01, insecure=True)
        assert [asked for _, asked in server.requested] == [
            None, "bytes=300000-", "bytes=600000-", "bytes=900000-",
        ]  # fmt: skip
    assert (tmp_path / "w.bin").read_bytes() == CONTENT
    assert sorted(f.name for f in tmp_path.iterdir()) == [".lock", "w.bin"]


def test_a_second_process_goes_on_too_and_a_changed_file_starts_again(tmp_path):
    with Server({"/w.bin": CONTENT}, stop_after=1000, times=1) as server:
        part = tmp_path / ".w.bin.part"
        part.write_bytes(CONTENT[:5000])
        version = f'"{hashlib.sha256(CONTENT).hexdigest()}"'
        (tmp_path / ".w.bin.part.json").write_text(json.dumps({"version": version}))
        fetch_url(f"{server.url}/w.bin", tmp_path / "w.bin", patience=0.01, insecure=True)
        assert server.requested[0][1] == "bytes=5000-"
    (tmp_path / "w.bin").unlink()
    with Server({"/w.bin": CONTENT[::-1]}) as server:
        part.write_bytes(CONTENT[:5000])
        (tmp_path / ".w.bin.part.json").write_text(json.dumps({"version": version}))
        fetch_url(f"{server.url}/w.bin", tmp_path / "w.bin", patience=0.01, insecure=True)
    assert (tmp_path / "w.bin").read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges_starts_again(tmp_path):
    with Server({"/w.bin": CONTENT}, stop_after=1000, times=2, ranges=False) as server:
        fetch_url(f"{server.url}/w.bin", tmp_path / "w.bin", patience=0.01, insecure=True)
    assert (tmp_path / "w.bin").read_bytes() == CONTENT


def test_a_busy_server_is_asked_again_and_a_weak_validator_resumes_by_date(tmp_path):
    with Server({"/w.bin": CONTENT}, stop_after=300_000, times=1) as server:
        server.busy, server.weak = 3, True
        fetch_url(f"{server.url}/w.bin", tmp_path / "w.bin", patience=0.001, insecure=True)
        assert [asked for _, asked in server.requested] == [None, "bytes=300000-"]
    assert (tmp_path / "w.bin").read_bytes() == CONTENT


def test_two_processes_that_want_one_file_fetch_it_once(tmp_path):
    with Server({"/w.bin": CONTENT}) as server, ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda _: fetch_url(f"{server.url}/w.bin", tmp_path / "w.bin", insecure=True),
                range(4),
            )
        )
        assert len(server.requested) == 1


@pytest.mark.parametrize("url", ["https://h/../../x.pt", "https://h", "https://h/"])
def test_an_address_that_names_no_file_is_refused(url):
    with pytest.raises(UserError, match="does not name a file"):
        download_path(url)
    assert download_path("https://h/uc?id=1") != download_path("https://h/uc?id=2")


def test_a_hub_that_does_not_answer_is_one_message(tmp_path):
    done = apart(
        tmp_path, "source=org/sd", script="scripts/fetch_weights.py", HF_HUB_OFFLINE=None,
        HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    assert "org/sd could not be fetched from the hub" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_always_hangs_up_is_an_error_and_keeps_the_rest(tmp_path):
    with (
        Server({"/w.bin": CONTENT}, stop_after=0, times=99) as server,
        pytest.raises(UserError, match=r"5 attempts in a row failed at 0\.0 MB"),
    ):
        fetch_url(f"{server.url}/w.bin", tmp_path / "w.bin", patience=0.001, insecure=True)
    assert not (tmp_path / "w.bin").exists()


def test_a_checksum_is_kept_or_the_file_thrown_away(tmp_path):
    right, wrong = hashlib.sha256(CONTENT).hexdigest(), "0" * 64
    with Server({"/w.bin": CONTENT}) as server:
        fetch_url(f"{server.url}/w.bin#sha256={right}", tmp_path / "right.bin")
        assert sha256_of(tmp_path / "right.bin") == right
        with pytest.raises(UserError, match=r"not 0000.*what came was thrown away"):
            fetch_url(f"{server.url}/w.bin#sha256={wrong}", tmp_path / "wrong.bin")
        with pytest.raises(UserError, match="the server answers 404"):
            fetch_url(f"{server.url}/none", tmp_path / "none.bin", insecure=True)
        with pytest.raises(UserError, match=r"right\.bin has the SHA-256 .*, not 0000"):
            fetch_url(f"{server.url}/w.bin#sha256={wrong}", tmp_path / "right.bin")
    assert not list(tmp_path.glob("*wrong*"))


@pytest.fixture(autouse=True)
def _digests_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MGD3_WEIGHTS", str(tmp_path / "weights"))


def test_what_came_first_is_trusted_and_another_file_is_not(tmp_path, caplog):
    caplog.set_level("WARNING")
    first, path = hashlib.sha256(CONTENT).hexdigest(), tmp_path / "w.bin"
    with Server({"/w.bin": CONTENT}) as server:
        url = f"{server.url}/w.bin"
        fetch_url(url, path, insecure=True)
        trust(url, path)
        assert f"trusting what came, SHA-256 {first}, recorded in" in caplog.text
        server.files["/w.bin"] = CONTENT[::-1]
        fetch_url(url, path, insecure=True)  # it is there and as it was
        path.unlink()
        with pytest.raises(UserError, match=f"but what came first had {first}.*thrown away"):
            fetch_url(url, path, insecure=True)
        assert not path.exists()
        now = hashlib.sha256(CONTENT[::-1]).hexdigest()
        fetch_url(f"{url}#sha256={now}", path)
        trust(f"{url}#sha256={now}", path)
        fetch_url(url, path, insecure=True)
        path.write_bytes(b"x")
        with pytest.raises(UserError, match=f"but what came first had {now}"):
            fetch_url(url, path, insecure=True)


def test_plain_http_needs_a_checksum_or_a_word(tmp_path):
    with pytest.raises(UserError, match=r"give its checksum .*an https address, or insecure=true"):
        fetch_url("http://127.0.0.1:9/w.bin", tmp_path / "w.bin")
    assert not list(tmp_path.iterdir())


def test_a_redirect_out_of_https_is_not_followed():
    request = urllib.request.Request("https://host/w.bin")
    follow = _Redirects().redirect_request
    with pytest.raises(UserError, match=r"leads to http://elsewhere/w.bin, which is not encrypted"):
        follow(request, None, 302, "", {}, "http://elsewhere/w.bin")
    there = follow(request, None, 302, "", {}, "https://elsewhere/w.bin")
    assert there.full_url == "https://elsewhere/w.bin"


def checkpoint_server(tmp_path, cut=0, **options):
    torch.save({"state_dict": compvis_tensors()}, tmp_path / "made.ckpt")
    body = (tmp_path / "made.ckpt").read_bytes()
    return Server({"/cin/model.ckpt": body[: len(body) - cut]}, **options)


def test_what_the_script_fetches_is_what_a_run_finds(tree, tmp_path):
    weights = {"MGD3_WEIGHTS": str(tmp_path / "weights")}
    with checkpoint_server(tmp_path, stop_after=200_000, times=1) as server:
        url = f"{server.url}/cin/model.ckpt"
        options = (
            "backbone=ldm_cin256", f"backbone.weights={url}", "backbone.image_size=64",
            "dataset=folder", f"dataset.root={tree}", "tracker=none",
        )  # fmt: skip
        before = run(tmp_path, *options, **weights)
        assert before.returncode == 1
        assert f"python scripts/fetch_weights.py source={url}" in before.stderr
        assert "backbone.weights=PATH" in before.stderr and "Traceback" not in before.stderr
        done = run(
            tmp_path, *options[:2], "insecure=true", script="scripts/fetch_weights.py", **weights
        )
        assert done.returncode == 0, done.stderr
        assert (
            str(tmp_path / f"weights/{server.url[7:].replace(':', '_')}/cin/model.ckpt")
            in done.stdout
        )
        count = len(server.requested)
        again = run(
            tmp_path, f"source={url}", "insecure=true", script="scripts/fetch_weights.py", **weights
        )
        assert again.returncode == 0 and len(server.requested) == count
    after = run(tmp_path, *options, "ipc=2", **weights)
    assert "first 10 classes and does not know the class 'cat'" in after.stderr  # it was read


def test_a_truncated_file_is_refused_and_not_kept(tmp_path):
    with checkpoint_server(tmp_path, cut=50_000) as server:
        done = run(
            tmp_path, f"source={server.url}/cin/model.ckpt", "insecure=true",
            script="scripts/fetch_weights.py", MGD3_WEIGHTS=str(tmp_path / "weights"),
        )  # fmt: skip
    assert done.returncode == 1
    assert "not a readable weight file" in done.stderr and "Traceback" not in done.stderr
    assert [f.name for f in (tmp_path / "weights").rglob("*") if f.is_file()] == [".lock"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "pipeline"
    small_stable_diffusion(folder)
    (folder / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not wanted")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"not wanted")
    return folder


def test_a_repository_is_fetched_for_offline_use(pipeline, tmp_path, monkeypatch):
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": None}
    name = "unet/diffusion_pytorch_model.safetensors"
    with weights_hub(pipeline, "org/sd") as server:
        path, size = f"/org/sd/resolve/{'0' * 40}/{name}", (pipeline / name).stat().st_size
        server.altered_once[path] = bytes(size)
        done = apart(
            tmp_path, "backbone=sd15", "backbone.weights=org/sd", script="scripts/fetch_weights.py",
            HF_ENDPOINT=server.url, **home,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        fetched = {path for path, _ in server.requested}
    assert not any("fp16" in path or "pruned" in path for path in fetched)
    assert not server.altered_once  # it was sent, and the file fetched again
    assert f"org/sd/{name}, {size / 1e6:.1f} MB" in done.stdout
    snapshot = done.stdout.split("org/sd: ")[1].strip()
    assert sha256_of(Path(snapshot) / name) == sha256_of(pipeline / name)
    backbone = StableDiffusion(snapshot, 64, 64)
    assert backbone.class_ids([ClassInfo("cat", "cat")]) == [1]
    assert backbone.latent_shape == (4, 8, 8)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    offline = run(
        tmp_path, "backbone=sd15", "backbone.weights=org/sd", "backbone.image_size=64",
        "backbone.output_size=8", "sampler.steps=2", "guidance.stop_t=1", "ipc=1", "tracker=none",
        "report=false", "compute.batch_size=10", "students=[convnet2_w8]",
        "protocol.epochs_by_ipc=[[null,2]]", "dataset.student_size=8",
    )  # fmt: skip
    assert offline.returncode == 0, offline.stderr[-1500:]
    assert len(list(tmp_path.rglob("images/*/*.png"))) == 10


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json"])
def test_an_altered_file_of_a_repository_is_thrown_away(pipeline, tmp_path, name):
    with weights_hub(pipeline, "org/sd", corrupt=[name]) as server:
        done = apart(
            tmp_path, "source=org/sd", script="scripts/fetch_weights.py", HF_ENDPOINT=server.url,
            HF_HOME=str(tmp_path / "hf"), HF_HUB_DISABLE_XET="1", HF_HUB_OFFLINE=None,
        )  # fmt: skip
    assert done.returncode == 1
    assert f"org/sd/{name} arrived with another size or checksum" in done.stderr
    (snapshot,) = (tmp_path / "hf/hub/models--org--sd/snapshots").iterdir()
    assert (snapshot / "vae/config.json").exists() and not (snapshot / name).exists()
    assert "Traceback" not in done.stderr


def test_offline_every_missing_weight_has_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # as at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    done = run(tmp_path, "dataset=digits", "backbone=sd15", "tracker=none")
    source = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert done.returncode == 1
    for part in (
        "hub's " + source,
        "python scripts/fetch_weights.py sd15.",
        "weights=PATH",
    ):
        assert part in done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("error:") == 1
    assert not (tmp_path / "runs").exists(), "a run that cannot begin keeps no folder for itself"
    planned = run(tmp_path, "dataset=digits", "backbone=sd15", "tracker=none", "plan=true")
    assert planned.returncode == 0, planned.stderr
    assert f"lacks  backbone.weights={source}: these weights are not on" in planned.stdout
    swept = run(
        tmp_path, "-m", "backbone=sd15", "method=mgd3,unguided", "tracker=none", "plan=true"
    )
    assert swept.stdout.count(f"; lacks backbone.weights={source}") == 2, swept.stderr
    fetching = apart(tmp_path, source, script="scripts/fetch_weights.py", HF_HUB_OFFLINE="1")
    assert fetching.returncode == 1 and "HF_HUB_OFFLINE is set" in fetching.stderr


@pytest.mark.parametrize("more", [(), ("plan=true",)])
def test_classes_that_no_weights_know_are_refused_before_their_gigabytes(tree, tmp_path, more):
    root = f"dataset.root={tree}"
    done = run(tmp_path, "dataset=folder", root, "ipc=1", "tracker=none", *more)
    assert done.returncode == 1
    assert "is conditioned on ImageNet's classes and does not know the class 'cat'" in done.stderr
    assert "(docs/own_images.md)" in done.stderr and not (tmp_path / "runs").exists()


def test_an_unknown_backbone_lists_the_known(tmp_path):
    done = run(tmp_path, "backbone=dit_xl2", script="scripts/fetch_weights.py")
    assert done.returncode == 1
    assert "backbone=dit_xl2 is unknown. Did you mean dit_xl2_" in done.stderr
    done = run(tmp_path, "toy", script="scripts/fetch_weights.py")
    assert done.returncode == 0 and "this backbone needs no weights" in done.stdout


def test_what_is_fetched_of_a_repository():
    names = [
        "README.md", "model_index.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.bin", "vae/config.json",
        "vae/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    files = [HubFile(name, 1, None) for name in names]
    assert [f.name for f in needed_files(files, ["transformer"])] == names[1:4]
    assert [f.name for f in needed_files(files, ["vae"])] == [names[1], names[4], names[6]]
    alone = [HubFile(n, 1, None) for n in ("config.json", "diffusion_pytorch_model.safetensors")]
    assert needed_files(alone, ["vae"]) == alone


def test_the_golden_file_is_read_by_its_path(tmp_path):
    done = run(
        tmp_path, "backbone=dit_xl2_256", f"backbone.weights={GOLDEN / 'dit_mode_guidance.pt'}",
        f"backbone.vae={tmp_path}", script="scripts/fetch_weights.py",
    )  # fmt: skip
    assert done.returncode == 0
    assert str(GOLDEN / "dit_mode_guidance.pt") in done.stdout

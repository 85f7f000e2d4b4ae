"""`dataset=imagenette` on a machine that has neither data nor weights, against local servers."""

import hashlib
import re
from dataclasses import replace

import pytest
import torch
from conftest import run
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from networks import small_vae
from servers import weights_hub
from support import small_archive

from eval.results.rows import read_results
from mgd3.data.layouts.archives import ARCHIVES

KEYS = (
    "dataset=imagenette", "ipc=1", "students=[convnet2_w8]", "dataset.student_size=16",
    "protocol.epochs_by_ipc=[[null,2]]", "sampler.steps=4", "backbone.sampling.stop_t=2",
    "tracker=none", "report=false", "compute.device=cpu",
)  # fmt: skip
ENVIRONMENT = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": None, "IMAGENET_DIR": None}


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A server with fast.ai's archive and the hub's two repositories, each in little."""
    torch.manual_seed(0)
    dit = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, in_channels=4, out_channels=8,
        sample_size=32, patch_size=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    vae = small_vae(tmp_path / "vae")
    DiTPipeline(transformer=dit, vae=vae, scheduler=DDIMScheduler()).save_pretrained(
        tmp_path / "dit"
    )
    with (
        weights_hub(tmp_path / "dit", "facebook/DiT-XL-2-256") as server,
        weights_hub(tmp_path / "vae", "stabilityai/sd-vae-ft-mse") as other,
    ):
        archive = small_archive()
        server.files |= other.files | {"/imagenette2.tgz": archive}
        md5 = hashlib.md5(archive).hexdigest()
        entry = replace(ARCHIVES["imagenette"], md5=md5, gigabytes=len(archive) / 1e9)
        monkeypatch.setitem(ARCHIVES, "imagenette", entry)
        constants = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "hub"),
        }  # fmt: skip
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("MGD3_ARCHIVES", server.url)
        yield server


def test_one_command_fetches_everything_and_says_what_first(world, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    done = run(folder, *KEYS, f"data={tmp_path / 'data'}", **ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-1500:]
    (announced,) = re.findall("to be fetched first, .*", done.stdout)
    for part in ("imagenette2.tgz (dataset)", "facebook/DiT-XL-2-256 (backbone.weights)",
                 "stabilityai/sd-vae-ft-mse (backbone.vae)"):  # fmt: skip
        assert re.search(re.escape(part) + r", \d+\.\d MB", announced)
    assert done.stdout.index("to be fetched first") < done.stdout.index("fetching http")
    fetched = [path for path, _ in world.requested]
    assert "/imagenette2.tgz" in fetched and not any("/vae/" in path for path in fetched)
    (row,) = read_results(folder)
    assert row.dataset == "imagenette" and "restored from fast.ai's archive" in row.dataset_note

    before = len(world.requested)
    again = run(folder, *KEYS, "seed=1", f"data={tmp_path / 'data'}", **ENVIRONMENT)
    assert again.returncode == 0, again.stderr[-1500:]
    assert len(world.requested) == before and "to be fetched" not in again.stdout


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            ("dataset.download=false",),
            "archive is not in .*fetch_data.py imagenette",
        ),
        (("method=random", "dataset.download=false"), "fast.ai's archive is not in"),
        (("guidance.scale=no",), "guidance.scale='no' is not a number"),
    ],
)
def test_nothing_is_fetched_that_is_forbidden_or_would_be_wasted(world, tmp_path, keys, message):
    done = run(tmp_path, *KEYS, *keys, f"data={tmp_path / 'data'}", **ENVIRONMENT)
    assert done.returncode == 1 and re.search(message, done.stderr)
    assert "Traceback" not in done.stderr
    assert not any("/resolve/" in path or ".tgz" in path for path, _ in world.requested)


def test_the_hubs_silence_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run(tmp_path, "name=imagenette", f"data={tmp_path / 'data'}", script="scripts/fetch_data.py")
    done = run(
        tmp_path, *KEYS, f"data={tmp_path / 'data'}", **ENVIRONMENT | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 1 and "these weights are not on this machine" in done.stderr
    assert "Traceback" not in done.stderr

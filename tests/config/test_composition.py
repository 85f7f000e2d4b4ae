"""Every YAML composes and builds, and a choice changes nothing but its own group."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import run
from hydra.utils import get_class
from omegaconf import OmegaConf
from support import composed

from mgd3.config.build import build, build_distiller, build_protocol
from mgd3.config.identity import reads
from mgd3.config.schema import CONFIGS, validate
from mgd3.runtime.errors import UserError


def options(group):
    return sorted(p.stem for p in Path(CONFIGS, group).glob("*.yaml"))


SMALL_PARTS = ("modes", "guidance", "start", "finetune", "sampler", "protocol", "tracker")


@pytest.mark.parametrize(
    ("group", "name"),
    [(g, n) for g in ("modes", "guidance", "start", "sampler", "tracker") for n in options(g)],
)
def test_every_small_part_builds(group, name):
    if name == "coda" and find_spec("umap") is None:
        pytest.skip("umap-learn is not installed")
    assert build(composed(f"{group}={name}"), group)


@pytest.mark.parametrize("name", options("protocol"))
def test_every_protocol_builds(name):
    assert build_protocol(composed(f"protocol={name}")).name == name


@pytest.mark.parametrize("name", options("method"))
def test_every_method_builds(name):
    # vlcp takes text alone, and captions that a user must give
    more = "prompts=class" if name == "vlcp" else "backbone=toy"
    assert build_distiller(composed(f"method={name}", more))


@pytest.mark.parametrize("name", options("dataset"))
def test_every_dataset_composes(name):
    cfg = composed(f"dataset={name}")
    assert cfg.dataset.name == name
    validate(cfg)


@pytest.mark.parametrize("name", options("backbone"))
def test_every_backbone_composes(name):
    assert composed(f"backbone={name}").backbone["_target_"].startswith("mgd3.backbones.")


GROUPS = ("dataset", "protocol", "select", "compute", "sampler", "modes", "guidance", "start",
          "finetune", "features", "surrogate", "refine", "prompts", "tracker")  # fmt: skip


@pytest.mark.parametrize(
    ("group", "name"), [(g, n) for g in GROUPS for n in options(g) if n != "base"]
)
def test_a_choice_changes_no_other_group(group, name):
    """But for what goes with a dataset, which one file says (prepared.yaml)."""
    fixed = ("backbone=toy", "protocol=idc", "compute=cpu")
    fixed = [f for f in fixed if not f.startswith(group)]
    before, after = (
        OmegaConf.to_container(composed(*fixed, *more), resolve=False)
        for more in ((), (f"{group}={name}",))
    )
    assert {key for key in before if before[key] != after[key]} <= {group}


def test_what_goes_with_a_dataset_is_prepared_and_can_be_told_otherwise():
    cfg = composed("dataset=digits")
    assert (cfg.protocol.name, cfg.compute.batch_size) == ("hard_label_short", 50)
    assert cfg.backbone.weights.endswith("dit_digits.safetensors")
    cfg = composed("dataset=digits", "backbone=toy", "protocol=idc", "compute=auto")
    assert (cfg.protocol.name, cfg.compute.batch_size) == ("idc", 64)
    assert cfg.backbone.std == 0.3
    cfg = composed("experiment=photos64", "dataset.root=x", "backbone.weights=w", "backbone.vae=v")
    assert (cfg.dataset.name, cfg.compute.batch_size) == ("imagenette", 64)


def test_run_shows_its_own_keys_alone():
    assert set(composed()) == {
        "ipc", "seed", "students", "student_seeds", "first_student_seed", "pool", "flip",
        "on_step", "cache", "data", "runs", "plan", "report", "folder", "dataset", "backbone",
        "modes", "guidance", "start", "finetune", "features", "surrogate", "refine", "prompts",
        "select", "sampler", "protocol", "compute", "tracker", "method",
    }  # fmt: skip


@pytest.mark.parametrize("name", options("method"))
def test_what_a_method_reads_is_what_its_class_takes(name):
    """So that no value that moves an image is missing from a set's identity."""
    cfg = composed(f"method={name}")
    taken = set(inspect.signature(get_class(cfg.method["_target_"])).parameters)
    groups = {"backbone", "sampler", "guidance", "modes", "start", "finetune", "select", "features",
              "prompts"}  # fmt: skip
    read = set(reads(cfg))
    assert (taken & groups) - {"modes"} <= read
    assert ("precision" in read) == ("sampler" in taken)
    steered = not taken >= {"guidance", "start"} or any(
        build(cfg, part).needs_modes for part in ("guidance", "start")
    )
    assert "modes" not in taken or ("modes" in read) == steered


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes(name):
    validate(composed(f"experiment={name}"))


def test_imagenette_alone_means_the_paper():
    cfg = composed("dataset=imagenette", "ipc=10", "dataset.root=x")
    assert cfg.backbone.weights == "facebook/DiT-XL-2-256"
    assert cfg.backbone.vae == "stabilityai/sd-vae-ft-mse"
    assert cfg.backbone.image_size == 256
    assert cfg.sampler == {
        "_target_": "mgd3.sampling.samplers.DDPM", "steps": 50, "cfg_scale": 4.0, "cfg_channels": 3,
        "variance": "learned",
    }  # fmt: skip
    assert (cfg.guidance.scale, cfg.guidance.stop_t) == (0.1, 25)
    assert cfg.modes["_target_"] == "mgd3.modes.finders.KMeansModes"
    assert (cfg.protocol.name, cfg.protocol.image_size) == ("hard_label", 224)
    assert list(cfg.students) == ["convnet6", "resnetap10", "resnet18"]
    assert (cfg.method.name, cfg.tracker["_target_"]) == ("mgd3", "eval.tracking.WandbTracker")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+guidance.scal=0.3"], r"'scal' is unknown\. Did you mean scale\?"),
        (["guidance.stop_t=51"], r"guidance\.stop_t=51 .*0\.\.50"),
        (["method=random", "guidance.scale=-1"], r"guidance\.scale=-1"),
        (
            ["backbone=dit_latent"],
            r"weights/digits\.safetensors does not .*scripts/train_backbone\.py",
        ),
        (["backbone.weights=none.safetensors"], r"backbone\.weights=none\.safetensors does not"),
        (["compute.device=warp"], r"device=warp"),
        (["features=student", "select=diverse"], r"pool=1 leaves nothing to select"),
        (["pool=2", "select=diverse", "method=mgd3", "features=none"], r"add features=student"),
    ],
)
def test_wrong_options_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build_distiller(composed(*overrides))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["protocol.image_size=x"], "protocol.image_size='x'"),
        (["dataset.student_size=null"], "protocol.image_size=None"),
        (["sampler.steps=x"], "sampler.steps='x'"),
        (["sampler.steps=2.5"], "sampler.steps=2.5"),
        (["backbone.sampling.stop_t=x"], "guidance.stop_t='x'"),
        (["method=igd", "backbone=dit_latent", "backbone.image_size=x"], "image_size='x'"),
    ],
)
def test_what_is_reckoned_from_no_number_is_refused_where_it_is_read(tmp_path, given, named):
    """Resolvers pass it on: the part that reads it says what is allowed."""
    refused = run(tmp_path, "dataset=digits", *given)
    assert refused.returncode == 1
    assert f"{named} is not an integer" in refused.stderr

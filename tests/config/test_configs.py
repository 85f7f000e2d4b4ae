"""Every YAML composes and builds; identities move when they should; layers stay apart."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT
from support import composed

from mgd3.config.build import build, build_distiller, build_protocol, claim_folder
from mgd3.config.schema import (
    CONFIGS,
    DISTILLATION_KEYS,
    EVALUATION_KEYS,
    identity,
    validate,
)
from mgd3.runtime.errors import UserError


def options(group):
    return sorted(p.stem for p in Path(CONFIGS, group).glob("*.yaml"))


SMALL_PARTS = ("modes", "guidance", "start", "finetune", "sampler", "protocol", "tracker")


@pytest.mark.parametrize(
    ("group", "name"),
    [(g, n) for g in ("modes", "guidance", "start", "sampler", "tracker") for n in options(g)],
)
def test_every_small_part_builds(group, name):
    assert build(composed(f"{group}={name}"), group)


@pytest.mark.parametrize("name", options("protocol"))
def test_every_protocol_builds(name):
    assert build_protocol(composed(f"protocol={name}")).name == name


@pytest.mark.parametrize("name", options("method"))
def test_every_method_builds(name):
    assert build_distiller(composed(f"method={name}", "backbone=toy"))


@pytest.mark.parametrize("name", options("dataset"))
def test_every_dataset_composes(name):
    cfg = composed(f"dataset={name}")
    assert cfg.dataset.name == name
    validate(cfg)


@pytest.mark.parametrize("name", options("backbone"))
def test_every_backbone_composes(name):
    assert composed(f"backbone={name}").backbone["_target_"].startswith("mgd3.backbones.")


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
    ("override", "distilled_again", "another_run"),
    [
        ("seed=1", True, True),
        ("ipc=20", True, True),
        ("guidance.scale=0.2", True, True),
        ("sampler.steps=51", True, True),
        ("method=random", True, True),
        ("pool=2", True, True),
        ("students=[convnet2]", False, False),
        ("protocol=hard_label", False, True),
        ("student_seeds=3", False, False),
        ("tracker=none", False, False),
        ("batch_size=7", False, False),
        ("workers=5", False, False),
        ("runs=elsewhere", False, False),
    ],
)
def test_identity(override, distilled_again, another_run):
    plain, changed = composed(), composed(override)
    every = DISTILLATION_KEYS + EVALUATION_KEYS
    assert (identity(plain, DISTILLATION_KEYS) != identity(changed, DISTILLATION_KEYS)) == (
        distilled_again
    )
    assert (identity(plain, every) != identity(changed, every)) == another_run


def test_a_folder_of_other_values_is_refused(tmp_path):
    for _ in range(2):
        claim_folder(tmp_path, composed(), "identity.json", DISTILLATION_KEYS)
    with pytest.raises(UserError, match=r"guidance\.scale=0\.3 \(there: 0\.1\)"):
        claim_folder(tmp_path, composed("guidance.scale=0.3"), "identity.json", DISTILLATION_KEYS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+guidance.scal=0.3"], r"'scal' is unknown\. Did you mean scale\?"),
        (["guidance.stop_t=51"], r"guidance\.stop_t=51 .*0\.\.50"),
        (["method=random", "guidance.scale=-1"], r"guidance\.scale=-1"),
        (["backbone=dit_latent"], r"backbone\.weights is not set"),
        (["backbone.weights=none.safetensors"], r"backbone\.weights=none\.safetensors does not"),
        (["device=warp"], r"device=warp"),
        (["select=diverse"], r"pool=1 leaves nothing to select"),
        (["pool=2", "select=diverse", "method=mgd3", "features=none"], r"add features=student"),
    ],
)
def test_wrong_options_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build_distiller(composed(*overrides))


LEVELS = {
    "mgd3.types": 0, "mgd3.runtime.checks": 0.5, "mgd3.runtime.seeding": 0, "mgd3.backbones.schedule": 0.5, "mgd3.data.pixels": 0,
    "mgd3.runtime.progress": 0, "mgd3.runtime.distributed": 0.5, "mgd3.runtime.machine": 0, "mgd3.runtime.allocator": 0,
    "mgd3.data.class_lists": 0.9, "mgd3.runtime.files": 1, "mgd3.data.datasets": 1, "mgd3.runtime.batching": 1,
    "mgd3.backbones.weights.download": 1.5,
    "mgd3.runtime.timing": 1.5, "mgd3.data.previews": 1.5, "mgd3.data.inventory": 1.5, "mgd3.data.distilled": 1.5,
    "mgd3.data.background_writer": 2,
    "mgd3.backbones": 2, "mgd3.modes.finders": 2, "mgd3.sampling.guidance": 2, "mgd3.sampling.samplers": 2,
    "mgd3.sampling.starts": 1.5, "mgd3.distillers.pool": 2, "mgd3.modes.latents": 2, "mgd3.finetuning.losses": 2,
    "mgd3.finetuning.averaged_training": 2, "mgd3.finetuning.loss_curves": 0, "mgd3.distillers.siamese_augmentation": 1,
    "mgd3.finetuning.memories": 2, "mgd3.finetuning.difffit": 2,
    "mgd3.modes.discovery": 2.5, "mgd3.finetuning.tuning": 2.7, "mgd3.finetuning.from_scratch": 3, "mgd3.distillers": 3,
    "mgd3.config.schema": 4, "mgd3.config.build": 5, "mgd3.api": 3.5,
    "mgd3.config.paper": 4, "mgd3.config.requests": 5, "mgd3.config.grid": 6,
}  # fmt: skip


def _level(module):
    return next((LEVELS[k] for k in LEVELS if module == k or module.startswith(k + ".")), None)


def _imports(path):
    """Modules imported at run time; those under `if TYPE_CHECKING` are annotations only."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"mgd3.{a.name}" for a in node.names if node.module == "mgd3")
            yield from [node.module] if node.module != "mgd3" else []
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", sorted((ROOT / "mgd3").rglob("*.py")), ids=lambda p: p.stem)
def test_no_module_imports_upwards(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    if module == "mgd3":
        return
    mine = _level(module)
    assert mine is not None, f"give {module} a level"
    package = module.rsplit(".", 1)[0]
    for name in _imports(path):
        assert not name.startswith(("eval", "wandb")), f"{module} imports {name}"
        if mine < 4:
            assert not name.startswith(("hydra", "omegaconf")), f"{module} imports {name}"
        if (name.startswith("mgd3.") and not name.startswith(package + ".")) or package == "mgd3":
            level = _level(name)
            assert level is None or level < mine, f"{module} imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "eval").rglob("*.py")), ids=lambda p: p.stem)
def test_evaluation_knows_the_dataset_folder_not_the_method(path):
    for name in _imports(path):
        level = _level(name) if name.startswith("mgd3") else 0
        assert level is not None and (level < 2), f"{path} imports {name}"
        assert not name.startswith(("hydra", "omegaconf"))
        assert not name.startswith("wandb") or path.stem == "tracking"

"""What moves a run to another folder, and what does not."""

import json
import os
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from mgd3.config import identity
from mgd3.config.identity import overrides_of, register, set_identity
from mgd3.config.schema import choices, composed
from mgd3.runtime.errors import UserError

SAME, SCORES, SET = "the same folders", "another folder of scores", "another set"

SHIPPED = ROOT / "mgd3/backbones/weights/dit_digits.safetensors"
CHANGES = [  # base command, then the change
    ("", "compute.device=cpu", SAME),
    ("", "compute.batch_size=7", SAME),
    ("", "compute.workers=5 compute.compile=true compute.channels_last=true", SAME),
    ("", "compute=cpu", SAME),
    ("", "tracker=none report=false cache=elsewhere", SAME),
    ("", "students=[convnet2] student_seeds=3 first_student_seed=2", SAME),
    ("", "backbone.sampling.variance=learned", SAME),  # its value is the sampler's, unchanged
    ("", f"backbone.weights={SHIPPED}", SAME),  # the default by its whole path
    ("guidance.scale=1", "guidance.scale=1.0", SAME),
    ("", "seed=1", SET),
    ("", "ipc=20", SET),
    ("", "pool=2", SET),
    ("", "flip=random", SET),
    ("", "guidance.scale=0.2", SET),
    ("", "guidance.stop_t=24", SET),
    ("", "backbone.sampling.stop_t=24", SET),
    ("", "guidance.stop_t=25", SAME),  # half of the steps, unless told otherwise
    ("sampler.steps=20", "guidance.stop_t=10", SAME),
    ("sampler.steps=20", "guidance.stop_t=11", SET),
    ("backbone=sd15", "guidance.stop_t=24", SAME),
    ("backbone=sd15 sampler.steps=25", "guidance.stop_t=12", SAME),
    ("", "modes=bisecting", SET),
    ("", "modes.n_init=2", SET),
    ("modes=bisecting", "modes.n_init=1", SAME),
    ("modes=bisecting", "modes.n_init=10", SET),
    ("", "compute.precision=bfloat16", SET),
    ("", "dataset.classes=[0,1,2]", SET),
    ("", "protocol=hard_label", SCORES),
    ("", "protocol.epochs_by_ipc=[[null,5]]", SCORES),
    ("", "protocol.epochs=5", SCORES),
    ("", "compute.encoding_precision=bfloat16", SET),
    ("", "compute.encoding_precision=float32", SAME),
    ("method=closest_real", "compute.encoding_precision=tf32", SET),
    ("method=minimax", "compute.encoding_precision=tf32", SET),  # it is fine-tuned on latents
    ("method=dap", "compute.encoding_precision=bfloat16", SET),
    ("method=d3hr", "compute.encoding_precision=bfloat16", SET),
    ("modes=coda", "compute.encoding_precision=bfloat16", SET),
    ("method=unguided", "compute.encoding_precision=bfloat16", SAME),
    ("method=random", "compute.encoding_precision=bfloat16", SAME),
    ("", "compute.training_precision=bfloat16", SCORES),
    ("", "compute.training_precision=tf32", SCORES),
    ("method=random", "compute.precision=bfloat16", SAME),  # real images have no precision
    ("method=random", "backbone=toy modes=gmm guidance=none sampler.steps=9", SAME),
    ("method=random", "seed=1", SET),
    ("method=full", "ipc=3 seed=4", SAME),
    ("method=first_files", "seed=4", SAME),
    ("method=closest_real", "guidance.scale=0.3 seed=1 compute.precision=bfloat16", SAME),
    ("method=closest_real", "modes=bisecting", SET),
    ("method=unguided", "modes=bisecting", SAME),
    ("method=dap", "modes=bisecting", SAME),
    ("method=dap", "flip=random", SET),
    ("method=dap", "guidance.block=3", SET),
    ("method=dap", "guidance.block=2", SAME),  # the backbone's own
    ("method=manifoldgd", "guidance.push=0", SET),
    ("method=igd", "guidance.influence.twin=true", SET),
    ("method=igd", "guidance.influence.twin=false", SAME),
    ("method=unguided", "features=student", SAME),
    ("backbone=sd15", "prompts=class", SAME),  # as before there were others
    ("method=vlcp prompts.captions=a", "prompts.common=0.8", SET),
    ("method=vlcp prompts.captions=a", "modes.contamination=0.2", SET),
    ("method=vlcp prompts.captions=a", "modes.n_init=10", SAME),
    ("method=minimax", "compute.training_precision=bfloat16", SET),
    ("method=herding", "features.epochs=9", SET),
    ("dataset=folder dataset.root=a", "dataset.root=b", SAME),  # content is compared instead
    ("dataset=folder dataset.root=a", "dataset.skip_broken=true", SAME),
    ("dataset=folder dataset.root=a", "dataset.max_per_class=3", SET),
    ("dataset=folder dataset.root=a", "dataset.student_size=64", SCORES),
]


def folders(*overrides):
    register()
    cfg = composed(*overrides)
    return identity.folders(cfg, choices(cfg))


@pytest.mark.parametrize(("base", "change", "expected"), CHANGES, ids=str)
def test_changes(base, change, expected):
    before = folders(*base.split())
    after = folders(*base.split(), *change.split())
    assert (before[0] == after[0], before == after) == {
        SAME: (True, True), SCORES: (True, False), SET: (False, False),
    }[expected]  # fmt: skip


def test_what_reads_latents_says_in_which_precision_they_are_encoded():
    """Whoever minds whether real images are mirrored reads their latents."""
    reads = {}
    for path in sorted((ROOT / "configs").glob("*/*.yaml")):
        reads[path] = OmegaConf.to_container(OmegaConf.load(path), resolve=False).get("reads") or []
    mirrored = {path for path, keys in reads.items() if "flip" in keys}
    assert len(mirrored) > 10
    assert mirrored <= {path for path, keys in reads.items() if "encoding_precision" in keys}


def test_a_renamed_module_and_a_new_neutral_option_stay_and_a_version_moves(monkeypatch):
    before = folders()
    monkeypatch.setattr(identity, "_SKIPPED", (*identity._SKIPPED, "center"))
    assert folders() == before  # as if modes.center were not there yet
    assert folders("+modes.version=2")[0] != before[0]
    moved = ("modes._target_=elsewhere.KMeansModes",)
    assert folders(*moved)[0] != before[0]  # a class of one's own makes another set
    own = identity._defaults
    monkeypatch.setattr(identity, "_defaults", lambda *c: own(*c) | renamed(c))
    assert folders(*moved) == before


@pytest.mark.parametrize(
    ("size", "later"), [(8, 0), (64, 0), (65, 1), (128, 1), (129, 0), (224, 0)]
)
def test_rows_of_networks_that_have_changed_are_of_another_run(size, later):
    """ResNets of 65 to 128 px: only there protocols and features have moved."""
    own = {"hard_label": 1, "idc": 1, "soft_label": 1, "soft_label_fkd": 2}
    for name, version in own.items():
        cfg = composed(f"protocol={name}", f"dataset.student_size={size}", "method=herding")
        scores, made = (
            identity.score_identity(cfg, choices(cfg)),
            identity.set_identity(cfg, choices(cfg)),
        )
        assert scores["protocol"]["version"] == version + later
        assert made["features"]["version"] == 1 + later


def renamed(group_and_choice):
    """As if the YAML named the class's new module."""
    of_modes = group_and_choice[0] == "modes"
    return {"_target_": "elsewhere.KMeansModes"} if of_modes else {}


@pytest.mark.parametrize(
    "identity",
    [
        {"dataset": {"choice": "digits", "values": {"_target_": "subprocess.Popen"}}},
        {"dataset": {"choice": "digits", "values": {"x._target_": "subprocess.Popen"}}},
        {"dataset": {"choice": "../../x", "values": {}}},
        {"dataset": {"choice": "nosuch", "values": {}}},
        {"dataset": {"choice": ["digits"], "values": {}}},
        {"hydra": {"choice": "x", "values": {"searchpath": ["file:///tmp"]}}},
        {"tracker": {"choice": "wandb", "values": {}}},
        {"on_step": "os.system"},
        {"seed": "${oc.env:HOME}"},
        {"modes": {"choice": "kmeans", "values": {"n_init": "${oc.env:HOME}"}}},
        {"modes": {"choice": "kmeans", "values": {"n_init": {"a": 1}}}},
        {"modes": {"choice": "kmeans", "values": {"n_init 1": 1}}},
        {"features": {"choice": "student", "values": {"student": "os.system"}}},
        {"dataset": {"choice": "digits", "values": {"name": "a\nb"}}},
    ],
    ids=str,
)
def test_what_a_file_says_is_data(identity):
    register()
    with pytest.raises(UserError, match="an identity"):
        overrides_of(identity)


def test_seedless_sets_say_so_in_their_path():
    assert folders("method=full")[0].split("/")[:-1] == ["digits", "full"]
    assert folders("method=closest_real")[0].split("/")[:-1] == ["digits", "closest_real", "ipc10"]
    assert folders()[0].startswith("digits/mgd3/ipc10/seed0-")


def test_what_follows_the_seed_is_no_difference_between_seeds():
    """ManifoldGD's tree is drawn anew for each seed: five seeds are one row of a table."""

    def cell(*overrides):
        cfg = composed("dataset=digits", *overrides)
        return identity.cell_id(set_identity(cfg, choices(cfg)), {})

    manifold = ("method=manifoldgd",)
    assert cell(*manifold, "seed=0") == cell(*manifold, "seed=3")
    assert folders(*manifold, "seed=0")[0] != folders(*manifold, "seed=3")[0]
    assert cell(*manifold, "seed=3") != cell(*manifold, "seed=3", "modes.random_state=0")
    assert cell("guidance.stop_t=3", "seed=3") != cell("guidance.stop_t=4", "seed=3")


def test_weights_count_by_what_they_are_not_where(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "w.safetensors").write_bytes(b"x" * 100)
    one, two = (
        folders("backbone=dit_latent", f"backbone.weights={tmp_path / p / 'w.safetensors'}")
        for p in "ab"
    )
    assert one == two
    (tmp_path / "b/w.safetensors").write_bytes(b"x" * 101)
    other = folders("backbone=dit_latent", f"backbone.weights={tmp_path / 'b/w.safetensors'}")
    assert other[0] != one[0]


def test_a_folder_of_weights_counts_by_its_content_and_no_other_folder_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pipeline").mkdir()
    cfg = composed("backbone=sd15", "backbone.weights=pipeline", "backbone.prompt=./name")
    (tmp_path / "name").mkdir()
    assert identity.set_files(cfg) == {"backbone.weights": Path("pipeline")}


def test_a_file_counts_whatever_it_is_called(tmp_path, monkeypatch):
    """A name with neither slash nor dot is a file all the same where only a file can stand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "captions").write_text("{}")
    (tmp_path / "kmeans").write_text("no part of it")
    cfg = composed("method=vlcp", "dataset=digits", "prompts.captions=captions")
    assert list(identity.set_files(cfg)) == ["prompts.captions"]


def test_the_folder_where_one_stands_does_not_count(tmp_path, monkeypatch):
    """Shipped weights are found from anywhere."""
    found = []
    for place in (ROOT, tmp_path):
        monkeypatch.chdir(place)
        cfg = composed()
        found.append((folders(), identity.set_files(cfg)))
    assert found[0][0] == found[1][0]
    assert [list(files) for _, files in found] == [["backbone.weights"]] * 2


def test_a_teachers_weights_count_by_content(tmp_path):
    register()
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(b"x" * 100)
    cfg = composed("protocol=soft_label_short", f"dataset.training.teacher_weights={path}")
    assert identity.score_files(cfg) == {"protocol.teacher.weights": path}


@pytest.mark.parametrize(
    "overrides",
    [
        ("method=d4m", "start.strength=0.5", "ipc=3"),
        (
            "backbone=sd15",
            'backbone.prompt="a {name}, photo"',
            "dataset=imagenette",
            "dataset.root=x",
        ),
        ("method=herding", "features.epochs=7"),
        ("method=cao2", "select.order=ascending", "refine.upper=5", "ipc=50"),
        ("method=d3hr", "start.match=exact", "ipc=3"),
        ("pool=2", "select=diverse", "features=student", "compute.precision=bfloat16"),
        ("dataset=digits", "dataset.classes=[3,5]", "guidance=mode_tangent"),
    ],
)
def test_an_identity_gives_its_command_again(overrides):
    register()
    cfg = composed(*overrides)
    made_from = json.loads(json.dumps(set_identity(cfg, choices(cfg))))
    again = composed(*overrides_of(made_from))
    assert set_identity(again, choices(again)) == set_identity(cfg, choices(cfg))


def test_the_command_moves_with_its_environment():
    """IMAGENET_DIR is where files lie, not what they are."""
    register()
    for value in ("a", "b"):
        os.environ["IMAGENET_DIR"] = value
        try:
            found = folders("dataset=imagenette")
        finally:
            del os.environ["IMAGENET_DIR"]
    assert found == folders("dataset=imagenette")

"""The hard-label protocol's numbers: epochs, milestones and tests by IPC, and what is refused."""

import dataclasses

import pytest
import torch
from support import composed

from eval.protocols.hard_label import HardLabel
from eval.students.registry import make_student
from mgd3.config.build import build_protocol
from mgd3.config.schema import plain
from mgd3.runtime.errors import UserError


def protocol(*overrides):
    return build_protocol(composed("dataset=imagenette", "dataset.root=unused", *overrides))


@pytest.mark.parametrize(
    ("ipc", "classes", "epochs", "milestones", "every"),
    [
        (1, 10, 3000, (2000, 2500), 30),
        (10, 10, 2000, (1333, 1666), 20),
        (20, 10, 1500, (1000, 1250), 15),
        (50, 10, 1500, (1000, 1250), 15),
        (100, 10, 1000, (666, 833), 10),
        (300, 10, 500, (333, 416), 5),
        (1000, 10, 300, (200, 250), 3),
        (1, 100, 2000, (1333, 1666), 20),
        (10, 100, 1300, (866, 1083), 13),
        (50, 100, 1000, (666, 833), 10),
        (100, 100, 600, (400, 500), 6),
        (300, 100, 300, (200, 250), 3),
        (500, 100, 300, (200, 250), 3),
        (1300, 100, 300, (200, 250), 3),  # the full set: --epochs 300, not two thirds of it
        (10, 1000, 2000, (1333, 1666), 20),
    ],
)
def test_epochs_milestones_and_tests(ipc, classes, epochs, milestones, every):
    recipe = protocol().recipe(ipc, classes, "convnet6")
    assert (recipe.epochs, recipe.schedule.milestones) == (epochs, milestones)
    assert recipe.tests == (*range(every, epochs, every), epochs)
    many = classes > 100
    assert (recipe.lr, recipe.weight_decay, recipe.batch_size) == (
        (0.1, 1e-4, 128) if many else (0.01, 5e-4, 64)
    )


def test_adamw_takes_the_place_of_sgd_alone():
    """Of IGD and DMGD: epochs, milestones, batches and augmentation are those of SGD's."""
    sgd, adamw = (protocol(f"protocol={n}") for n in ("hard_label", "hard_label_adamw"))
    for classes in (10, 1000):
        one, two = (p.recipe(10, classes, "convnet3") for p in (sgd, adamw))
        changed = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.01}
        assert two == dataclasses.replace(one, **changed)
    assert adamw.augmentation == sgd.augmentation
    net = make_student("convnet3", 10, 32, seed=0)
    optimizer = two.make_optimizer(net)
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-8, 0.01)
    assert len(group["params"]) == len(list(net.parameters()))  # biases and norms decay as well


def test_epochs_stand_in_place_of_the_whole_table():
    short, whole = protocol("protocol.epochs=20"), protocol("protocol.epochs_by_ipc=[[null,20]]")
    for ipc, classes in ((1, 10), (10, 100), (600, 1000)):
        assert short.epochs(ipc, classes) == 20
    assert short.recipe(10, 10, "convnet6") == whole.recipe(10, 10, "convnet6")


def test_an_ipc_without_a_row_is_refused():
    with pytest.raises(UserError, match=r"no row for ipc=20.* or give protocol\.epochs=300"):
        protocol("protocol.epochs_by_ipc=[[10,5]]").recipe(20, 10, "convnet6")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("epochs_by_ipc=[[null,0]]", r"epochs_by_ipc=0 is out of range"),
        ("epochs=0", r"protocol\.epochs=0 is out of range"),
        (
            "epochs_by_ipc=5",
            r"5 must be a pair.* write protocol\.epochs_by_ipc=\[\[10,",
        ),
        (
            "optimization.optimizer=adam",
            r"protocol\.optimization\.optimizer='adam' is unknown.*sgd",
        ),
        ("optimization.milestones=[1/0]", r"optimization\.milestones: '1/0' is not a fraction"),
        ("optimization.milestones=2/3", r"milestones='2/3' must be a list of fractions"),
        ("optimization.lr=x", r"protocol\.optimization\.lr='x' is not a number"),
        ("optimization.batch_size=0", r"protocol\.optimization\.batch_size=0 is out of range"),
        ("many_classes.lr=x", r"protocol\.many_classes\.lr='x'"),
        ("augmentation.crop_ratio=[0,1.33]", r"crop_ratio=\[0, 1\.33\] must be .* both above 0"),
        ("augmentation.crop_scale=[1.0,0.5]", r"augmentation\.crop_scale=.* must be \[low, high\]"),
        ("augmentation.crop_ratio=1", r"augmentation\.crop_ratio=1 must be \[low, high\]"),
        ("augmentation.cutmix=2", r"protocol\.augmentation\.cutmix=2 is out of range"),
        ("augmentation=none", r"augmentation='none' must be a mapping of crop_scale, crop_ratio"),
    ],
)
def test_wrong_protocol_values_are_named(override, message):
    with pytest.raises(UserError, match=message):
        protocol(f"protocol.{override}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+protocol.optimization.lrr=1", r"optimization='lrr' is unknown\. Did you mean lr\?"),
        ("+protocol.many_classes.least=1", r"many_classes='least' .*Allowed: above, lr"),
        ("+protocol.augmentation.patches=2", r"augmentation='patches' .*Allowed: crop_scale"),
        ("~protocol.optimization.gamma", r"protocol\.optimization\.gamma is not set"),
    ],
)
def test_unknown_and_missing_nested_keys_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        protocol(override)


def test_the_training_precision_comes_from_outside():
    options = plain(composed("dataset=imagenette", "protocol=hard_label").protocol)
    left = ("_target_", "version", "family", "reads", "students")
    kept = {k: v for k, v in options.items() if k not in left}
    assert HardLabel(**kept).recipe(10, 10, "convnet6").precision == "float32"
    fast = HardLabel(**kept, training_precision="bfloat16")
    assert fast.recipe(10, 10, "convnet6").precision == "bfloat16"
    with pytest.raises(UserError, match=r"compute\.training_precision='half'"):
        HardLabel(**kept, training_precision="half")


def test_a_protocol_says_what_students_see():
    assert (protocol().labels, protocol().augmented) == ("hard", True)
    assert not protocol("protocol=hard_label_noaug").augmented
    assert protocol("protocol=hard_label_noaug", "protocol.augmentation.cutmix=0.5").augmented
    off = ("jitter=0", "lighting=0", "flip=0", "cutmix=0", "crop_scale=[1,1]", "crop_ratio=[1,1]")
    assert not protocol(*(f"protocol.augmentation.{o}" for o in off)).augmented

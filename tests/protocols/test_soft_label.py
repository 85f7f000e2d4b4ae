"""Soft labels: RDED's constants, the loss in float64, patches and crops by hand, teachers."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import run
from support import composed
from torchvision.transforms.functional import resized_crop

from eval.images import TestImages
from eval.protocols.answers import Answers, StoredAnswers, soft_loss
from eval.protocols.augmentation import antialiased_crop, draw_strips, shuffle_patches
from eval.protocols.recipe import Teacher
from eval.protocols.training import StudentTraining
from eval.results.rows import read_results
from eval.students.registry import make_student
from mgd3.config.build import build_protocol
from mgd3.config.schema import plain
from mgd3.data.digits import Digits
from mgd3.runtime.errors import UserError
from mgd3.storage.files import read_json
from mgd3.storage.tensors import save_tensors

CPU = torch.device("cpu")


def protocol(*overrides, name="soft_label"):
    return build_protocol(
        composed("dataset=imagenette", "dataset.root=unused", f"protocol={name}", *overrides)
    )


@pytest.mark.parametrize(
    ("ipc", "classes", "batch"),
    [(1, 10, 10), (10, 10, 50), (50, 10, 100), (1, 1000, 20), (10, 1000, 100), (50, 1000, 200),
     (10, 100, 100), (20, 10, 50), (100, 100, 200)],
)  # fmt: skip
def test_the_released_batch_sizes(ipc, classes, batch):
    assert protocol().recipe(ipc, classes, "resnet18_bn").batch_size == batch


def test_the_half_cosine_and_the_six_tests():
    recipe = protocol().recipe(10, 1000, "resnet18_bn")
    assert recipe.schedule.factor(150) == pytest.approx(0.8536, abs=1e-4)
    assert recipe.schedule.factor(299) == pytest.approx(0.5026, abs=1e-4)
    assert recipe.tests == (250, 260, 270, 280, 290, 300)
    fkd = protocol(name="soft_label_fkd").recipe(10, 1000, "resnet18_bn")
    assert fkd.schedule.factor(150) == pytest.approx(0.5)
    assert fkd.schedule.factor(299) == pytest.approx(2.7e-5, rel=0.03)
    assert fkd.tests == (1, 51, 101, 151, 201, 251, 300)  # epochs 0, 50 ... and the last, from 0
    assert fkd.batch_size == 1024


def test_rates_by_student_and_decay_on_weights_alone():
    assert protocol().recipe(10, 10, "alexnet").lr == 1e-4
    recipe = protocol().recipe(10, 10, "resnet18_bn")
    net = make_student("resnet10", 10, 32, seed=0)
    optimizer = recipe.make_optimizer(net)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, free = optimizer.param_groups
    assert (recipe.lr, decayed["weight_decay"], free["weight_decay"]) == (1e-3, 0.01, 0.0)
    assert all(p.dim() > 1 for p in decayed["params"])
    assert all(p.dim() == 1 for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))


def test_the_loss_is_the_divergence_of_softened_logits():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    p, q = (teacher / 20).softmax(1), (student / 20).softmax(1)
    by_hand = (p * (p.log() - q.log())).sum(1)
    assert torch.allclose(soft_loss(student, teacher, 20), by_hand, atol=1e-15)
    assert soft_loss(teacher, teacher, 20).abs().max() < 1e-15


def test_crops_are_torchvisions_with_antialiasing():
    images = torch.rand(3, 3, 40, 48, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0, 0, 40, 48], [5, 7, 30, 21], [1, 2, 9, 11]])
    flips = torch.tensor([False, True, False])
    out = antialiased_crop(images, boxes, flips, 16)
    for image, box, flip, mine in zip(images, boxes.tolist(), flips, out, strict=True):
        theirs = resized_crop(image, *box, [16, 16], antialias=True)
        assert torch.allclose(mine, theirs.flip(-1) if flip else theirs, atol=1e-5)


def test_patches_keep_every_pixel_and_move_strips_as_wholes():
    image = torch.arange(16).view(1, 1, 4, 4).expand(64, 3, 4, 4).to(torch.uint8)
    draw = torch.Generator().manual_seed(0)
    shuffled = shuffle_patches(image, *(draw_strips(64, 2, draw) for _ in range(2)))
    left, right = [0, 1], [2, 3]
    expected = set()
    for columns in (left + right, right + left):
        for rows in (left + right, right + left):
            expected.add(tuple(image[0, 0][rows][:, columns].flatten().tolist()))
    seen = {tuple(one[0].flatten().tolist()) for one in shuffled}
    assert seen == expected  # all four arrangements of 64 images, and no other
    assert draw_strips(64, 1, draw) is None
    assert shuffle_patches(image, None, None) is image


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "augmentation.patches=3",
            r"protocol\.augmentation\.patches=3 does not divide the stored images' 256 px",
        ),
        ("batch_by_ipc=[[10,50]]", r"no row for ipc=1"),
        ("batch_by_ipc=[10]", r"10 must be a pair \[smallest ipc, batch size\]"),
        ("optimization.lr_by_student.vit=x", r"protocol\.optimization\.lr_by_student\.vit='x'"),
        ("tests.first=0", r"protocol\.tests\.first=0 is out of range"),
        ("tests.after=2", r"protocol\.tests\.after=2 is out of range"),
        ("answers.temperature=0", r"protocol\.answers\.temperature=0"),
        ("answers.source=hard", r"protocol\.answers\.source='hard'"),
        ("teacher.epochs=0", r"protocol\.teacher\.epochs=0"),
        ("teacher.minimum_top1=x", r"protocol\.teacher\.minimum_top1='x'"),
        ("teacher.student=resnet7", r"students: 'resnet7'"),
    ],
)
def test_wrong_values_are_named(override, message):
    with pytest.raises(UserError, match=message):
        protocol(f"protocol.{override}").recipe(1, 10, "resnet18_bn")


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("optimization.momentum", "lr, lr_by_student"),
        ("answers.labels", "source, seed, temperature"),
        ("augmentation.size", "patches, crop_scale"),
        ("tests.before", "first, every, after"),
        ("many_classes.above", "from_classes, batch_factor"),
        ("teacher.key", "student, epochs, seed, weights, recipe, minimum_top1"),
        ("teacher.recipe.augmentation.patches", "crop_scale, crop_ratio"),
        ("teacher.recipe.patches", "augmentation, epochs"),
    ],
)
def test_unknown_nested_keys_are_refused(key, allowed):
    with pytest.raises(UserError, match=f"is unknown.*Allowed: {allowed}"):
        protocol(f"+protocol.{key}=1")


def test_a_protocol_says_what_students_see():
    assert (protocol().labels, protocol().augmented) == ("soft", True)
    off = [f"protocol.augmentation.{o}" for o in ("flip=0", "cutmix=0", "crop_scale=[1,1]")]
    assert protocol(*off).augmented
    assert not protocol(*off, "protocol.augmentation.patches=1").augmented


def test_the_protocol_changes_nothing_but_itself():
    hard, soft = (composed(f"protocol={name}") for name in ("hard_label_short", "soft_label_fkd"))
    assert hard.keys() == soft.keys()
    keys = hard.keys() - {"protocol", "folder", "hydra"}  # a folder has the protocol's name
    differing = {key for key in keys if plain(hard[key]) != plain(soft[key])}
    assert not differing


class Blurred(torch.nn.Sequential):
    """Of a kind that is not known: for all one can see its passes leave something behind."""


@pytest.mark.parametrize(
    ("student", "unknown", "passes"),
    [("convnet2_w8", False, 1), ("resnet10", False, 1), ("resnetap10_w8", False, 1),
     ("convnet2_w8", True, 2), ("resnet10_bn", False, 2), ("vit_glad", False, 2)],
)  # fmt: skip
def test_the_second_pass_is_made_where_it_leaves_something_behind(
    student, unknown, passes, tmp_path
):
    """Batch norm moves twice, dropout draws twice; where a pass changes nothing there is one."""
    trained, asked = {}, {}
    for double in ("false", "true"):
        own = digits_protocol(
            tmp_path, "dataset.student_size=32", f"protocol.double_norm_update={double}"
        )
        teacher = make_student("convnet2_w8", 10, 32, seed=1).eval()
        own.teacher = Teacher(name="teacher", source="here", top1=100.0, network=teacher)
        net = make_student(student, 10, 32, seed=0)
        net = Blurred(net) if unknown else net
        pixels = torch.randint(256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(0))
        recipe = replace(own.recipe(1, 10, student), epochs=1, tests=(1,))
        training = StudentTraining(
            net, recipe, own.objective(pixels.byte()), 0, tmp_path / f"{student}-{double}"
        )
        made = []
        net.register_forward_hook(lambda own, *_, made=made: made.append(own.training))
        assert training.one_epoch(pixels.byte(), torch.arange(10))
        trained[double], asked[double] = net.state_dict(), len(made)
    assert asked == {"false": 1, "true": passes}
    same = [torch.equal(trained["true"][k], v) for k, v in trained["false"].items()]
    assert all(same) == (passes == 1 or unknown)


def digits_protocol(cache, *overrides):
    return build_protocol(
        composed(
            "protocol=soft_label_short", f"cache={cache}", "compute.device=cpu",
            "protocol.teacher.epochs=20", *overrides,
        )
    )  # fmt: skip


def test_the_teacher_is_trained_once_and_one_of_another_class_order_is_refused(tmp_path):
    test = TestImages(Digits(8), tmp_path, 1)
    teacher = digits_protocol(tmp_path).prepare(test, CPU)
    assert teacher.name == "convnet3_w64" and teacher.top1 > 75
    (path,) = (tmp_path / "students").glob("*.safetensors")
    stamp = path.stat().st_mtime_ns
    assert digits_protocol(tmp_path).prepare(test, CPU).top1 == teacher.top1
    assert path.stat().st_mtime_ns == stamp
    assert not list((tmp_path / "students").glob("*.part"))  # the checkpoint goes with the end

    state = teacher.network.state_dict()
    rows = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9, 0])
    turned = state | {k: v[rows] for k, v in state.items() if k.startswith("classifier")}
    classes = '["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]'
    save_tensors(tmp_path / "turned.safetensors", turned, {"classes": classes})
    wrong = digits_protocol(tmp_path, f"protocol.teacher.weights={tmp_path}/turned.safetensors")
    with pytest.raises(UserError, match=r"the classes of dataset=digits in another order"):
        wrong.prepare(test, CPU)
    foreign = digits_protocol(tmp_path, "protocol.teacher.weights=torchvision")
    with pytest.raises(UserError, match=r"knows ImageNet's classes only, and dataset=digits"):
        foreign.prepare(test, CPU)


def test_stored_answers_are_the_teachers_in_half_precision(tmp_path):
    net = make_student("convnet2_w8", 5, 16, seed=0).eval()
    images = torch.randn(6, 3, 16, 16)
    stored = StoredAnswers(net, "float32", tmp_path / "labels")
    stored.begin(3)
    first = stored(images)
    assert torch.equal(first, Answers(net, "float32")(images).half().float())
    again = StoredAnswers(
        make_student("convnet2_w8", 5, 16, seed=9), "float32", tmp_path / "labels"
    )
    again.begin(3)
    assert torch.equal(again(images), first)  # the second student asks no teacher
    again.begin(4)
    assert not torch.equal(again(images), first)
    again.begin(3)
    assert not torch.equal(again(images, 0, 12), first)  # half of a larger batch
    (path,) = (tmp_path / "labels/6/0003").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    stored.begin(3)
    assert torch.equal(stored(images), first)  # a damaged file is made again


@pytest.mark.parametrize("source", ["online", "stored"])
def test_a_run_with_soft_labels_names_its_teacher(tmp_path, source):
    done = run(
        tmp_path, "method=random", "ipc=2", "tracker=none", "report=false", "compute.device=cpu",
        "protocol=soft_label_short", "protocol.epochs=4", f"protocol.answers.source={source}",
        "protocol.teacher.epochs=20", "student_seeds=2", "students=[convnet2_w8]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    rows = read_results(tmp_path)
    assert [r.teacher for r in rows] == ["convnet3_w64"] * 2
    assert rows[0].teacher_top1 == rows[1].teacher_top1 > 75
    kept = list(tmp_path.rglob("cache/labels/*/*/*/*.safetensors"))
    assert len(kept) == (8 if source == "stored" else 0)  # two batches, four epochs, once
    (manifest,) = tmp_path.rglob("manifest.json")
    assert "protocol" not in read_json(manifest)["config"]


def test_families_share_a_rate():
    names = ("vit_p8_w64", "timm/swin_tiny_patch4_window7_224", "vgg11_glad", "resnet50_bn")
    assert [protocol().recipe(10, 10, n).lr for n in names] == [1e-4, 1e-4, 5e-4, 1e-3]


def test_small_images_are_never_stored_smaller_than_they_are_seen():
    for size in (4, 8, 20, 64, 224):
        made = protocol(f"dataset.student_size={size}", "dataset.training.teacher=convnet1_w8")
        assert made.stored_size >= size
        assert size < 56 or made.stored_size == size // 7 * 8


def test_the_half_cosine_reaches_half_the_rate():
    factor = protocol().recipe(10, 10, "resnet18_bn").schedule.factor
    assert factor(300) == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))

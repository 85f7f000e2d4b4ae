"""Teachers trained elsewhere: RDED's format, torchvision's, and what is refused by name.

The networks are trained here: a linear map of mean colours, put into torchvision's ResNet.
"""

import logging

import numpy as np
import pytest
import torch
import torchvision
from support import composed, row

from eval.images import TestImages
from eval.protocols.augmentation import MEAN, STD
from eval.protocols.observers import PUBLISHED, _rows, origin, refuse_other_orders
from eval.results.tables import notes
from mgd3.config.build import build_protocol, build_space
from mgd3.data.class_lists import ClassInfo, read_class_list
from mgd3.data.digits import ArrayImage
from mgd3.runtime.errors import UserError
from mgd3.storage.tensors import save_tensors

CPU = torch.device("cpu")
SIZE = 136  # pixels: above 128 the stem is torchvision's
WOOF = read_class_list("imagewoof")[:6]  # whose order is not that of their wnids


class Colours:
    """A grey value for each class, of ImageWoof's classes or of others."""

    name, student_size, skip_broken, location, note = "imagewoof", SIZE, False, None, None

    def __init__(self, classes=WOOF):
        self.classes = tuple(classes)

    def images(self, split, label):
        value = grey(label, len(self.classes))
        pixels = np.full((SIZE, SIZE, 3), value, dtype=np.uint8)
        return [ArrayImage(f"{split}/{label}/{k}", pixels) for k in range(4)]


def grey(label, count):
    return 20 + 200 * label // (count - 1)


def observer(values):
    """torchvision's ResNet-18 whose row r answers loudest to the grey values[r]; None: to nothing.

    Every stage passes on the positive and the negative part of the mean of the three channels, so
    that the classifier sees the grey value x and takes the largest of 2 v x - v^2.
    """
    net = torchvision.models.resnet18(num_classes=len(values))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.weight.zero_()
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 0.0
        net.conv1.weight[0, :, 3, 3] = 1 / 3  # the centre: its 7x7 kernel sees no border so
        net.bn1.bias[0] = 10  # nothing is cut off below zero
        for name in ("layer2", "layer3", "layer4"):
            getattr(net, name)[0].downsample[0].weight[0, 0] = 1
    x = [np.mean([(v / 255 - m) / s for m, s in zip(MEAN, STD, strict=True)]) for v in
         (0 if v is None else v for v in values)]  # fmt: skip
    v = torch.tensor(x, dtype=torch.float32) + 10
    net.fc.weight.data.zero_()
    net.fc.weight.data[:, 0] = 2 * v
    net.fc.bias.data = -(v**2)
    for k, value in enumerate(values):
        if value is None:
            net.fc.weight.data[k], net.fc.bias.data[k] = 0, -1e6
    return net.state_dict()


def in_order(classes, order):
    """The grey of each row, rows in `order` of the classes' wnids."""
    place = {c.wnid: grey(label, len(classes)) for label, c in enumerate(classes)}
    return [place[wnid] for wnid in order]


OWN = [c.wnid for c in WOOF]


def protocol(tmp_path, weights, *overrides):
    return build_protocol(
        composed(
            "dataset=imagewoof", "dataset.root=unused", f"dataset.student_size={SIZE}",
            "protocol=soft_label", f"cache={tmp_path / 'cache'}", "compute.device=cpu",
            f"protocol.teacher.weights={weights}", *overrides,
        )
    )  # fmt: skip


def taught(tmp_path, weights, dataset, *overrides):
    return protocol(tmp_path, weights, *overrides).prepare(
        TestImages(dataset, tmp_path / "cache", 1), CPU
    )


@pytest.mark.parametrize("rows", ["the classes'", "ImageNet's"])
def test_rdeds_observers_load_in_their_own_format(tmp_path, caplog, rows):
    path = tmp_path / "imagenet-woof_resnet18.pth"
    values = in_order(WOOF, OWN)
    if rows == "ImageNet's":
        thousand = [None] * 1000
        for c, value in zip(WOOF, values, strict=True):
            thousand[c.imagenet_id] = value
        values = thousand
    torch.save({"model": observer(values), "epoch": 300}, path)
    with caplog.at_level(logging.INFO):
        teacher = taught(tmp_path, path, Colours())
    assert teacher.top1 == 100
    assert teacher.network.fc.out_features == len(WOOF)
    assert teacher.source == "RDED's file imagenet-woof_resnet18.pth"
    assert "RDED publishes 75 % of its ResNet-18" in caplog.text
    assert not (tmp_path / "cache/students").exists()  # nothing was trained


def test_cao2s_judge_asks_for_all_of_imagenets_classes(tmp_path):
    """Class 3's grey is also that of a class of ImageNet's that is none of ours, and louder."""
    values: list = [None] * 1000
    for c, value in zip(WOOF, in_order(WOOF, OWN), strict=True):
        values[c.imagenet_id] = value
    state, other = observer(values), next(k for k in range(1000) if values[k] is None)
    own = WOOF[3].imagenet_id
    state["fc.weight"][other] = state["fc.weight"][own]
    state["fc.bias"][other] = state["fc.bias"][own] + 0.1
    torch.save(state, tmp_path / "judge.pth")

    def judge(*options):
        cfg = composed(
            "dataset=imagewoof", "dataset.root=unused", "features=imagenet",
            f"features.weights={tmp_path / 'judge.pth'}", f"features.image_size={SIZE}",
            "compute.device=cpu", *options,
        )  # fmt: skip
        return build_space(cfg, "features").fit(Colours(), [])

    images = [Colours().images("train", label)[0].decode() for label in range(6)]
    _, logits = judge()(images)
    assert logits.shape == (6, 1000)
    found = logits.argmax(dim=1).tolist()
    assert found[:3] + found[4:] == [0, 1, 2, 4, 5] and found[3] > 5
    assert not torch.equal(judge("features.inputs=released")(images)[1], logits)
    with pytest.raises(UserError, match="knows ImageNet's classes only"):
        others = Colours([ClassInfo(f"c{k}", f"c{k}") for k in range(6)])
        judge_of = composed(
            "features=imagenet", f"features.weights={tmp_path / 'judge.pth'}",
            f"features.image_size={SIZE}", "compute.device=cpu",
        )  # fmt: skip
        build_space(judge_of, "features").fit(others, [])


def test_torchvisions_weights_run(tmp_path, monkeypatch):
    """A file of their format where torch's hub keeps them; older ones lack batch norm's counts."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    thousand = [None] * 1000
    for c, value in zip(WOOF, in_order(WOOF, OWN), strict=True):
        thousand[c.imagenet_id] = value
    state = {k: v for k, v in observer(thousand).items() if not k.endswith("tracked")}
    torch.save(state, folder / "resnet18-f37072fd.pth")
    teacher = taught(tmp_path, "torchvision", Colours())
    assert (teacher.top1, teacher.source) == (100, "torchvision's IMAGENET1K_V1")
    (folder / "resnet18-f37072fd.pth").write_bytes(b"cut short")
    with pytest.raises(UserError, match="torchvision's weights of resnet18_bn cannot be had"):
        taught(tmp_path, "torchvision", Colours())


def test_all_of_imagenet_has_its_own_order():
    """1000 rows for 1000 classes: by ImageNet's index, however the classes are listed."""
    dataset = Colours(reversed(read_class_list("imagenet1k")))
    assert _rows(1000, dataset, "key") == list(range(999, -1, -1))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (sorted(OWN), "sorted wnids"),
        ([c.wnid for c in sorted(WOOF, key=lambda c: c.name)], "sorted names"),
        ([OWN[1], OWN[0], *OWN[2:]], "the one that fits best"),
    ],
)
def test_rows_in_another_order_are_refused_by_what_they_are(tmp_path, order, words):
    path = tmp_path / "w.pth"
    torch.save({"model": observer(in_order(WOOF, order))}, path)
    first = rf"w\.pth: its rows are .* in another order, {words} \({','.join(order[:3])},…\)"
    with pytest.raises(UserError, match=f"{first}: read so it is right on 100.0 %"):
        taught(tmp_path, path, Colours(), "protocol.teacher.minimum_top1=0")
    listed = Colours(sorted(WOOF, key=lambda c: order.index(c.wnid)))
    values = [grey(label, len(WOOF)) for label in range(len(WOOF))]
    torch.save({"model": observer(values)}, path)
    assert taught(tmp_path, path, listed).top1 == 100  # the remedy: the classes in its order


def test_classes_that_are_hard_to_tell_apart_are_no_other_order():
    """Each mistaken for the other in 11 of 20 images: still this order; in 15 of 20: the other."""
    dataset = Colours()
    labels = torch.arange(6).repeat_interleave(20)
    answers = labels.clone()
    answers[0:11], answers[20:31] = 1, 0  # 10 points better with their places changed
    refuse_other_orders(answers, labels, dataset, "key")
    answers[0:15], answers[20:35] = 1, 0  # 50 points better
    with pytest.raises(UserError, match=r"the one that fits best .* 91\.7 % .* 75\.0 %"):
        refuse_other_orders(answers, labels, dataset, "key")
    refuse_other_orders(torch.zeros(120, dtype=torch.long), labels, dataset, "key")


def test_an_observer_near_chance_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": observer([None] * 5 + [0])}, path)
    message = r"right on 16\.7 % .*chance is 16\.6667 %; RDED publishes 75 %"
    with pytest.raises(UserError, match=message):
        taught(tmp_path, path, Colours())


OTHERS = [ClassInfo(f"c{k}", f"class {k}") for k in range(6)]
NARROW = {"layers.conv.0.weight": torch.zeros(2, 3, 3, 3), "classifier.weight": torch.zeros(6, 2)}


@pytest.mark.parametrize(
    ("content", "dataset", "overrides", "message"),
    [
        (lambda: observer([0] * 7), Colours(), (), r"another class count: .* 7 classes .* has 6"),
        (lambda: observer([0] * 1000), Colours(OTHERS), (),
         r"knows ImageNet's classes only, and dataset=imagewoof has others"),
        (lambda: observer([0] * 6), Colours(), ("dataset.student_size=64",),
         r"of another image size: its first kernel is 7x7, that of resnet18_bn .* is 3x3"),
        (lambda: observer([0] * 6), Colours(), ("protocol.teacher.student=resnet18",),
         r"has batch norm and resnet18 has none"),
        (lambda: observer([0] * 6), Colours(), ("protocol.teacher.student=resnet34_bn",),
         r"missing .*layer1\.2"),
        (lambda: {"a": torch.zeros(2)}, Colours(), (), r"is no resnet18_bn: it has no classifier"),
        (lambda: NARROW, Colours(), (), r"is one of RDED's ConvNets"),
    ],
)  # fmt: skip
def test_other_networks_are_refused_by_name(tmp_path, content, dataset, overrides, message):
    path = tmp_path / "w.pth"
    torch.save({"model": content()}, path)
    with pytest.raises(UserError, match=message):
        taught(tmp_path, path, dataset, *overrides)


def test_a_file_that_would_run_code_is_only_read(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"model": print}, path)
    with pytest.raises(UserError, match=r"protocol\.teacher\.weights=.*w\.pth is not a readable"):
        taught(tmp_path, path, Colours())


def test_our_own_file_of_another_size_is_refused(tmp_path):
    metadata = {"classes": "[]", "made_from": '["resnet18_bn", 0, 224, {}, {}]'}
    save_tensors(tmp_path / "w.safetensors", {"a": torch.zeros(1)}, metadata)
    with pytest.raises(UserError, match=r"trained on images of 224 px, and these have 136"):
        taught(tmp_path, tmp_path / "w.safetensors", Colours())


def test_tables_say_where_a_teacher_comes_from():
    named = row(teacher="resnet18_bn", teacher_top1=89.8, teacher_source=origin("x/w.pth"))
    old = row(teacher="resnet18_bn", teacher_top1=70.0)
    assert notes([named, old])[:2] == [
        "Teacher resnet18_bn (file w.pth): 89.8 % of the real test images.",
        "Teacher resnet18_bn: 70.0 % of the real test images.",
    ]
    assert origin(None) == "trained here"
    assert PUBLISHED == {
        "imagenette": 90.0, "imagewoof": 75.0, "imageidc": 87.4, "imagenet100": 83.4,
    }  # fmt: skip

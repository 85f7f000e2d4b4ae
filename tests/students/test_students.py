"""Every student by name: its parameters, its image sizes, and weights that a seed alone decides."""

import copy
import logging

import pytest
import timm
import torch
import torchvision
from torch import nn

from eval.students import glad, registry
from eval.students.registry import (
    CROSS_ARCH,
    expand_students,
    find_student,
    make_student,
    network_version,
)
from mgd3.runtime.errors import UserError

# Every family once, each at the smallest image that it takes
SMALLEST = [
    ("convnet3_w8", 8),
    ("resnetap10_w8", 16),
    ("resnet10", 9),
    ("resnet18_bn", 8),
    ("resnet50_bn", 8),
    ("vit_p4_w64", 8),
    ("alexnet_glad", 8),
    ("vgg11_glad", 32),
    ("resnet18_glad", 9),
    ("vit_glad_p4", 8),
    ("timm/test_resnet", 8),
]


def on_meta(name, classes, size):
    """A student without memory: shapes only."""
    with torch.device("meta"):
        return find_student(name, size)(classes)


@pytest.mark.parametrize(
    ("name", "size", "classes", "parameters"),
    [  # the paper's students, torchvision's published totals, then GLaD's own modules at 128 px
        ("convnet6", 224, 10, 754_570),
        ("convnet6", 224, 100, 858_340),
        ("convnet6", 224, 1000, 1_896_040),
        ("resnetap10", 224, 10, 4_910_922),
        ("resnetap10", 224, 100, 4_957_092),
        ("resnetap10", 224, 1000, 5_418_792),
        ("resnet18", 224, 10, 11_181_642),
        ("resnet18", 224, 100, 11_227_812),
        ("resnet18", 224, 1000, 11_689_512),
        ("resnet18_bn", 224, 1000, 11_689_512),
        ("resnet34_bn", 224, 1000, 21_797_672),
        ("resnet50_bn", 224, 1000, 25_557_032),
        ("resnet101_bn", 224, 1000, 44_549_160),
        ("alexnet", 224, 1000, 61_100_840),
        ("vgg11", 224, 1000, 132_863_336),
        ("vit", 224, 1000, 86_567_656),
        ("alexnet_glad", 128, 10, 2_333_002),
        ("vgg11_glad", 128, 10, 9_476_874),
        ("resnet18_glad", 128, 10, 11_173_962),
        ("vit_glad", 128, 10, 16_176_650),
    ],
)
def test_parameter_counts_and_logits_at_the_protocols_sizes(name, size, classes, parameters):
    student = on_meta(name, classes, size)
    assert sum(p.numel() for p in student.parameters()) == parameters
    assert student(torch.empty(2, 3, size, size, device="meta")).shape == (2, classes)


def test_alexnet_classifies_at_224_px():
    student = make_student("alexnet", 7, 224, seed=0).eval()
    with torch.inference_mode():
        assert student(torch.randn(2, 3, 224, 224)).shape == (2, 7)


@pytest.mark.parametrize(("name", "size"), SMALLEST)
@torch.no_grad()
def test_the_smallest_images_still_differ_in_their_logits(name, size):
    student = make_student(name, 7, size, seed=0)
    if name.startswith("vit_p"):  # torchvision's head starts at zero
        nn.init.normal_(student.heads.head.weight)
    draw = torch.Generator().manual_seed(0)
    logits = student.eval()(torch.randn(3, 3, size, size, generator=draw))
    assert logits.shape == (3, 7)
    assert logits.std(dim=0).min() > 1e-4


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("convnet4", 15, r"convnet4 halves 15 px 4 times .* convnet1 to convnet3"),
        ("convnet9", 32, r"convnet9 halves 32 px 9 times .* convnet1 to convnet5"),
        ("resnetap18", 15, r"resnetap18 .* 15 px .* 16 px or more"),
        ("resnet50", 8, r"resnet50 .* 8 px .* 9 px or more"),
        ("resnet18_glad", 8, r"resnet18_glad .* 8 px .* 9 px or more"),
        ("alexnet", 62, r"alexnet .* 62 px .* 63 px or more"),
        ("vgg11", 31, r"vgg11 .* 31 px .* 32 px or more"),
        ("alexnet_glad", 7, r"alexnet_glad .* 7 px .* 8 px or more"),
        ("vgg11_glad", 31, r"vgg11_glad .* 31 px .* 32 px or more"),
        ("vit", 8, r"vit does not cut 8 px .* 16 px.* 32 px, 48 px, .* for 8 px _p1, _p2, _p4"),
        ("vit", 16, r"vit does not cut 16 px"),
        ("vit", 100, r"vit does not cut 100 px .* _p4, _p5"),
        ("vit_p3", 8, r"vit_p3 does not cut 8 px"),
        ("vit_glad", 72, r"vit_glad does not cut 72 px"),
        ("vit_p2_w100", 8, r"100 is no multiple .* _w64, _w128"),
        ("timm/test_vit", 32, r"timm/test_vit does not take images of 32 px; allowed: 160"),
        ("timm/resnet_none", 32, r"timm has no model 'resnet_none'"),
        ("timm/resnet18.none", 32, r"resnet18\.none is unknown .*allowed: timm/resnet18$"),
    ],
)
def test_sizes_that_a_student_cannot_learn_from_are_refused(name, size, message):
    with pytest.raises(UserError, match=f"students: .*{message}"):
        find_student(name, size)


@pytest.mark.parametrize(("name", "size"), [("alexnet", 63), ("vgg11", 32)])
def test_torchvisions_smallest_sizes_are_the_networks_own(name, size):
    on_meta(name, 5, size)(torch.empty(2, 3, size, size, device="meta"))
    with pytest.raises(RuntimeError, match="too small"):
        on_meta(name, 5, size)(torch.empty(2, 3, size - 1, size - 1, device="meta"))


@pytest.mark.parametrize(
    "name",
    [
        "resnet152_bn",
        "resnet18_BN",
        "resnet19",
        "alexnet_w8",
        "vit_glad_w64",
        "vit_p0",
        "convnet3_w0",
        "vgg",
    ],
)
def test_an_unknown_name_is_answered_with_what_there_is(name):
    with pytest.raises(UserError, match=r"is unknown\..* Allowed: .*_bn .*alexnet_glad"):
        find_student(name, 224)


def test_every_old_name_of_timms_is_found_or_refused_with_the_name_that_is_allowed():
    names = timm.models.get_deprecated_models()
    assert len(names) > 100
    for old, new in names.items():
        try:
            assert callable(find_student(f"timm/{old}", 224))
        except UserError as error:
            arch = new.split(".")[0]
            fixed = timm.models.get_pretrained_cfg(arch).input_size[-1]
            assert str(error).endswith((f"allowed: timm/{arch}", f"allowed: {fixed}")) or (
                f"timm/{old} does not take images of 224 px; allowed: " in str(error)
            )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tv_densenet121", "densenet121"),
        ("jx_nest_tiny", "nest_tiny_jx"),
        ("vit_base_resnet50_384", "vit_base_r50_s16_384"),
    ],
)
def test_an_old_name_of_timms_is_the_model_that_it_maps_to(old, new):
    size = 384 if "384" in old else 224
    ours, theirs = (on_meta(f"timm/{name}", 7, size).state_dict() for name in (old, new))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_the_log_says_a_new_name_once(caplog):
    registry._present_name.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            find_student("timm/tv_resnet34", 64)
            find_student("timm/resnet18", 64)
    new = timm.models.get_deprecated_models()["tv_resnet34"]
    assert caplog.messages == [
        f"students: timm/tv_resnet34 is called timm/{new} now, and that is taken"
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tv_densenet121.x", r"takes no tag\); allowed: timm/densenet121\.tv_in1k$"),
        ("vit_base_patch16_224_sam", r"allowed: timm/vit_base_patch16_224$"),
    ],
)
def test_an_old_name_that_leads_to_no_model_is_answered_with_one(name, message):
    with pytest.raises(UserError, match=f"students: timm/{name} is unknown .*{message}"):
        find_student(f"timm/{name}", 224)


@pytest.mark.parametrize(("name", "size"), SMALLEST)
def test_fresh_weights_depend_on_the_seed_alone(name, size):
    before = torch.get_rng_state()
    first = make_student(name, 3, size, seed=3).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(1)
    again = make_student(name, 3, size, seed=3).state_dict()
    other = make_student(name, 3, size, seed=4).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_resnet_bn_is_torchvisions_above_128_px():
    ours = make_student("resnet18_bn", 10, 224, seed=3).state_dict()
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=10).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(("size", "kernel", "side"), [(64, 3, 64), (96, 3, 48), (160, 7, 40)])
def test_stems_of_resnet_bn_follow_the_size(size, kernel, side):
    net = make_student("resnet10_bn", 5, size, seed=0)
    assert net.conv1.kernel_size == (kernel, kernel)
    assert net.maxpool(net.conv1(torch.zeros(1, 3, size, size))).shape[-1] == side
    assert net.conv1.weight.std().item() == pytest.approx((2 / (kernel**2 * 64)) ** 0.5, rel=0.05)


@pytest.mark.parametrize("name", ["resnet10", "resnet10_bn"])
@pytest.mark.parametrize("size", [65, 96, 128])
def test_stems_of_middle_sizes_pool_as_idcs(name, size):
    """3x3 of stride 2: the maximum of each pixel with an even place and its eight neighbours."""
    net = make_student(name, 5, size, seed=0)
    inputs = torch.randn(1, 2, size, size)
    padded = nn.functional.pad(inputs, (1, 1, 1, 1), value=-torch.inf)
    by_hand = padded.unfold(2, 3, 2).unfold(3, 3, 2).amax(dim=(-2, -1))
    assert torch.equal(net.maxpool(inputs), by_hand)


def test_resnetap_averages_where_resnet_takes_the_maximum():
    """IDC's and Minimax's resnet_ap.py have no other pooling at any size."""
    net = make_student("resnetap10", 5, 96, seed=0)
    inputs = torch.randn(1, 2, 96, 96)
    assert torch.equal(net.layer0.pool(inputs), nn.functional.avg_pool2d(inputs, 2))


@pytest.mark.parametrize(
    ("name", "size", "version"),
    [("resnet18", 64, 1), ("resnet18", 65, 2), ("resnet50_bn", 128, 2), ("resnet18_bn", 129, 1),
     ("resnetap10", 96, 1), ("convnet4", 96, 1), ("resnet18_glad", 96, 1)],
)  # fmt: skip
def test_networks_of_another_definition_have_another_version(name, size, version):
    assert network_version(name, size) == version


def test_batch_norm_over_a_single_value_is_named():
    net = make_student("resnet18_bn", 5, 8, seed=0)
    one = torch.randn(1, 3, 8, 8)
    for student in (net, copy.deepcopy(net)):
        with pytest.raises(UserError, match=r"resnet18_bn at 8 px .* batch holds one image"):
            student(one)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 5)
    assert net.eval()(one).shape == (1, 5)
    assert make_student("resnet18_bn", 5, 9, seed=0)(torch.randn(1, 3, 9, 9)).shape == (1, 5)


def test_layers_of_glads_alexnet_and_vgg11():
    alexnet = [
        (m.kernel_size[0], m.out_channels) if isinstance(m, nn.Conv2d) else type(m).__name__
        for m in glad.alexnet_glad(10, 32)
        if not isinstance(m, nn.ReLU)
    ]
    pool, head = "MaxPool2d", ["Flatten", "Linear"]
    last = [(3, 256), (3, 192), (3, 192), pool, *head]
    assert alexnet == [(5, 128), pool, (5, 192), pool, *last]
    vgg = list(glad.vgg11_glad(10))
    assert [m.out_channels for m in vgg if isinstance(m, nn.Conv2d)] == [
        64, 128, 256, 256, 512, 512, 512, 512
    ]  # fmt: skip
    norms = [m for m in vgg if isinstance(m, nn.GroupNorm)]
    assert all(m.num_groups == m.num_channels for m in norms)
    assert len(norms) == 8
    assert [type(m).__name__ for m in vgg[-3:]] == ["AdaptiveMaxPool2d", *head]


def test_glads_vit_normalises_nothing_and_drops_a_tenth():
    net = on_meta("vit_glad", 10, 128)
    assert not any(isinstance(m, nn.LayerNorm | nn.GroupNorm) for m in net.modules())
    assert {m.p for m in net.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert len(net.blocks) == 10
    assert net.position.shape == (1, 8 * 8 + 1, 512)


def test_glads_resnet_keeps_pytorchs_initialisation_and_every_pixel():
    net = make_student("resnet18_glad", 10, 224, seed=0)
    bound = (3 * 9) ** -0.5  # uniform within 1 / sqrt(fan-in)
    assert bound * 0.95 < net.conv1.weight.abs().max() <= bound
    assert net.conv1.stride == (1, 1)
    assert isinstance(net.maxpool, nn.Identity)


def test_groups_of_students_are_table_4s_four():
    assert CROSS_ARCH == ("alexnet", "vgg11", "resnet18", "vit")
    assert expand_students(["convnet6", "cross_arch", "vit", "convnet6", "mine"]) == [
        "convnet6", "alexnet", "vgg11", "resnet18", "vit", "mine"
    ]  # fmt: skip
    glads = expand_students(["cross_arch_glad"])
    assert glads == ["alexnet_glad", "vgg11_glad", "resnet18_glad", "vit_glad"]
    for name in (*CROSS_ARCH, *glads):
        for size in (128, 224, 256):
            find_student(name, size)


@pytest.mark.parametrize("name", ["convnet3", "resnetap18_w8", "resnet10", "timm/resnet18"])
@pytest.mark.parametrize("size", [32, 72])
def test_students_classify_images_of_any_size(name, size):
    logits = make_student(name, 7, size, seed=0)(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)

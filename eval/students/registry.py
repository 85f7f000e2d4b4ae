"""Students by name: the networks trained from scratch on a distilled dataset."""

from __future__ import annotations

import difflib
import importlib
import logging
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from eval.students import glad
from eval.students.convnet import ConvNet
from eval.students.dropout import portable
from eval.students.resnet import BLOCKS, resnet_bn, resnet_in
from eval.students.resnet_ap import ResNetAP
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import UserError, first_line

log = logging.getLogger(__name__)

CROSS_ARCH = ("alexnet", "vgg11", "resnet18", "vit")
_GROUPS = {"cross_arch": CROSS_ARCH, "cross_arch_glad": tuple(f"{n}_glad" for n in CROSS_ARCH)}

# Name: the smallest image in pixels, and the constructor by number of classes and image size
_FIXED: dict[str, tuple[int, Callable[[int, int], nn.Module]]] = {
    "alexnet": (63, lambda classes, _: _torchvision("alexnet", num_classes=classes)),
    "vgg11": (32, lambda classes, _: _torchvision("vgg11", num_classes=classes)),
    "alexnet_glad": (8, glad.alexnet_glad),
    "vgg11_glad": (32, lambda classes, _: glad.vgg11_glad(classes)),
    "resnet18_glad": (9, lambda classes, _: glad.resnet18_glad(classes)),  # as `_resnet` says
}

_GRAMMAR = (
    "convnet<depth>[_w<channels>], resnetap10|resnetap18[_w<channels of the first stage>], "
    f"{'|'.join(f'resnet{d}' for d in BLOCKS)} (instance norm) or the same with _bn (batch norm), "
    f"vit[_p<patch>][_w<width>], vit_glad[_p<patch>], {', '.join(_FIXED)}, timm/<model>, "
    "or <module>.<function> of your own; "
    f"in a list of students also {', '.join(_GROUPS)}"
)

# One name of each kind, for a name that is nearly one of them
_EXAMPLES = (
    *(f"convnet{depth}" for depth in range(1, 9)),
    *("resnetap10", "resnetap18", "vit", "vit_glad"),
    *(f"resnet{depth}{norm}" for depth in BLOCKS for norm in ("", "_bn")),
    *_FIXED,
    *_GROUPS,
)

Factory: TypeAlias = Callable[[int], nn.Module]  # by number of classes


def make_student(name: str, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """A student with fresh weights that depend on `seed` alone; `UserError` as `find_student`."""
    factory = find_student(name, image_size)
    with torch.random.fork_rng(devices=[]):  # nn.Module draws from the global generator
        torch.manual_seed(seed)
        student = portable(factory(num_classes))
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.register_forward_pre_hook(partial(_refuse_single_values, name, image_size))
    return student


def synchronised(net: nn.Module, ranks: Ranks) -> nn.Module:
    """The network with batch norms that see the images of all processes that share a batch.

    Raises `UserError` where PyTorch has none: on CPUs.
    """
    if ranks.world == 1 or not any(_is_batch_norm(m) for m in net.modules()):
        return net
    if next(net.parameters()).device.type == "cpu":
        raise UserError(
            "students with batch norm cannot share batches among CPU processes (PyTorch "
            "synchronises batch norm on GPUs only): use compute.parallel=students, or run without "
            "torchrun"
        )
    from timm.layers import convert_sync_batchnorm  # a second to import: only where needed

    return convert_sync_batchnorm(net)  # timm's: it keeps activations that norms contain


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def find_student(name: str, image_size: int) -> Factory:
    """The constructor of a student; checks its name and the images' size without building it.

    Raises `UserError` for an unknown name, and for a size that the network cannot learn from.
    """
    if name in _FIXED:
        minimum, make = _FIXED[name]
        _at_least(minimum, name, image_size)
        return lambda classes: make(classes, image_size)
    for pattern, family in _FAMILIES.items():
        if m := re.fullmatch(pattern, name):
            return family(name, image_size, *m.groups())
    close = difflib.get_close_matches(name, _EXAMPLES, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise UserError(f"students: {name!r} is unknown.{hint} Allowed: {_GRAMMAR}")


def network_version(name: str, image_size: int) -> int:
    """Which definition of a student's network this is: what was trained under another is not it.

    2: since ResNets of 65 to 128 px have IDC's overlapping max pool instead of a 2x2 one.
    """
    resnet = re.fullmatch(_RESNET, name) is not None
    return 2 if resnet and 64 < image_size <= 128 else 1


def expand_students(names: Sequence[str]) -> list[str]:
    """Names of students, each once, with groups replaced by their members.

    Both groups are the AlexNet, VGG-11, ResNet-18 and ViT of the paper's Table 4, whose
    definitions it does not state. `cross_arch` has them as CoDA's trainer, derived from MGD3's:
    torchvision's, and the hard-label protocol's ResNet-18 with instance norm. `cross_arch_glad`
    has GLaD's own, which the table's rows of earlier methods were measured with.
    """
    return list(dict.fromkeys(s for name in names for s in _GROUPS.get(name, (name,))))


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models  # seconds to import, and other students need none of it

    network: nn.Module = getattr(models, name)(**options)
    return network


def _convnet(name: str, image_size: int, depth: str, width: str | None) -> Factory:
    if int(depth) >= image_size.bit_length():  # image_size < 2**depth
        raise UserError(
            f"students: {name} halves {image_size} px {depth} times and has nothing left; "
            f"allowed here: convnet1 to convnet{image_size.bit_length() - 1}"
        )
    return lambda classes: ConvNet(int(depth), int(width or 128), classes, image_size)


def _resnet_ap(name: str, image_size: int, depth: str, width: str | None) -> Factory:
    _at_least(16, name, image_size)  # its norms need two pixels, as `_resnet` says
    return lambda classes: ResNetAP(int(depth), int(width or 64), classes, image_size)


def _resnet(name: str, image_size: int, depth: str, suffix: str | None) -> Factory:
    if suffix:
        return lambda classes: resnet_bn(int(depth), classes, image_size)
    # Up to 8 px the last stage has one pixel, which minus its mean is zero: every image gets the
    # same logits.
    _at_least(9, name, image_size)
    return lambda classes: resnet_in(int(depth), classes, image_size)


def _vit(name: str, image_size: int, patch: str | None, width: str | None) -> Factory:
    side, channels = int(patch or 16), int(width or 768)
    _check_patches(name, image_size, side)
    if channels % 64:
        raise UserError(
            f"students: {name} has heads of 64 channels, and {channels} is no multiple of that; "
            "allowed: _w64, _w128, ..."
        )
    # vit_b_16 but for image_size, patch and width; heads and MLP scale as in DeiT's tiny and small.
    return lambda classes: _torchvision(
        "VisionTransformer",
        image_size=image_size,
        patch_size=side,
        num_layers=12,
        num_heads=channels // 64,
        hidden_dim=channels,
        mlp_dim=4 * channels,
        num_classes=classes,
    )


def _vit_glad(name: str, image_size: int, patch: str | None) -> Factory:
    side = int(patch or 16)
    _check_patches(name, image_size, side)
    return lambda classes: glad.ViT(classes, image_size, side)


def _timm(name: str, image_size: int, model: str) -> Factory:
    import timm

    if not timm.is_model(model):
        close = ", ".join(timm.list_models(f"*{model.split('_')[0]}*")[:5])
        raise UserError(f"students: timm has no model {model!r}; close: {close or 'none'}")
    model = _present_name(model)
    try:
        config = timm.models.get_pretrained_cfg(model)
    except RuntimeError as error:  # the tag behind a dot
        plain = f"timm/{model.split('.')[0]}"
        raise UserError(f"students: {name} is unknown ({error}); allowed: {plain}") from error
    if config.fixed_input_size and config.input_size[1:] != (image_size, image_size):
        raise UserError(
            f"students: {name} does not take images of {image_size} px; "
            f"allowed: {config.input_size[-1]}"
        )
    return lambda classes: timm.create_model(model, num_classes=classes)


@cache  # a run finds its students several times, and says this once
def _present_name(model: str) -> str:
    """What timm calls a model now; `UserError` for an old name that leads to none."""
    import timm

    old, _, tag = model.partition(".")
    names = timm.models.get_deprecated_models()
    if old not in names:
        return model
    new = names[old]
    if new is None:
        raise UserError(f"students: timm has removed its model {old!r} and names no other")
    if tag:
        raise UserError(
            f"students: timm/{model} is unknown ({old} is an old name and takes no tag); "
            f"allowed: timm/{new}"
        )
    log.info("students: timm/%s is called timm/%s now, and that is taken", old, new)
    return new


def _own(name: str, image_size: int) -> Factory:
    """A function of a user's module, of the number of classes and the image size."""
    module, _, function = name.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a user's module raises
        raise UserError(
            f"students: {name} cannot be imported ({first_line(error)}); give module.function, "
            "and the module's folder in PYTHONPATH"
        ) from error

    def factory(classes: int) -> nn.Module:
        net = make(classes, image_size)
        if not isinstance(net, nn.Module):
            raise UserError(f"students: {name} returned a {type(net).__name__}, not an nn.Module")
        return net

    return factory


_NUMBER = r"([1-9]\d*)"
_RESNET = f"resnet({'|'.join(map(str, BLOCKS))})(_bn)?"
_FAMILIES: dict[str, Callable[..., Factory]] = {
    f"convnet{_NUMBER}(?:_w{_NUMBER})?": _convnet,
    f"resnetap(10|18)(?:_w{_NUMBER})?": _resnet_ap,
    _RESNET: _resnet,
    f"vit(?:_p{_NUMBER})?(?:_w{_NUMBER})?": _vit,
    f"vit_glad(?:_p{_NUMBER})?": _vit_glad,
    "timm/(.*)": _timm,
    r"[A-Za-z_]\w*(?:\.\w+)+": _own,
}


def _at_least(minimum: int, name: str, image_size: int) -> None:
    if image_size < minimum:
        raise UserError(
            f"students: {name} leaves nothing of {image_size} px to tell images apart by; allowed: "
            f"{minimum} px or more; convnet<depth> and resnet<depth>_bn take smaller images"
        )


def _check_patches(name: str, image_size: int, patch: int) -> None:
    if image_size % patch or image_size < 2 * patch:
        fits = [f"_p{p}" for p in range(1, image_size // 2 + 1) if image_size % p == 0]
        raise UserError(
            f"students: {name} does not cut {image_size} px into patches of {patch} px, two or "
            f"more a side; allowed: {2 * patch} px, {3 * patch} px, ..., or for {image_size} px "
            f"{', '.join(fits) or 'nothing'}"
        )


def _refuse_single_values(
    name: str, image_size: int, norm: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    """`UserError` where batch norm would have one value per channel to learn from."""
    x = inputs[0]
    if norm.training and x.numel() == x.shape[1]:
        raise UserError(
            f"students: {name} at {image_size} px normalises one pixel over the batch, and this "
            "batch holds one image; take a batch size that leaves no image alone, or larger images"
        )

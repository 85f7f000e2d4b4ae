"""Students by name: the networks trained from scratch on a distilled dataset."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from eval.nets.convnet import ConvNet
from eval.nets.resnet import BLOCKS, resnet_in
from eval.nets.resnet_ap import LAYERS, ResNetAP
from mgd3.types import UserError

_GRAMMAR = (
    "convnet<depth>[_w<channels>], resnetap10|resnetap18[_w<channels of the first stage>], "
    f"{'|'.join(f'resnet{d}' for d in BLOCKS)} (instance norm), or timm/<model>"
)


def make_student(name: str, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """A student with fresh weights that depend on `seed` alone; `UserError` for an unknown name."""
    factory = find_student(name, image_size)
    with torch.random.fork_rng(devices=[]):  # nn.Module draws from the global generator
        torch.manual_seed(seed)
        return factory(num_classes)


def find_student(name: str, image_size: int) -> Callable[[int], nn.Module]:
    """The constructor of a student, by number of classes; checks the name without building it."""
    if m := re.fullmatch(r"convnet(\d+)(?:_w(\d+))?", name):
        depth, width = int(m[1]), int(m[2] or 128)
        if depth < 1 or image_size // 2**depth < 1:
            raise UserError(
                f"students: {name} halves {image_size} px {depth} times and has nothing left; "
                f"allowed here: convnet1 to convnet{image_size.bit_length() - 1}"
            )
        return lambda classes: ConvNet(depth, width, classes, image_size)
    if (m := re.fullmatch(r"resnetap(\d+)(?:_w(\d+))?", name)) and int(m[1]) in LAYERS:
        depth, width = int(m[1]), int(m[2] or 64)
        return lambda classes: ResNetAP(depth, width, classes, image_size)
    if (m := re.fullmatch(r"resnet(\d+)", name)) and int(m[1]) in BLOCKS:
        depth = int(m[1])
        return lambda classes: resnet_in(depth, classes, image_size)
    if name.startswith("timm/"):
        import timm

        model = name.removeprefix("timm/")
        if not timm.is_model(model):
            close = ", ".join(timm.list_models(f"*{model.split('_')[0]}*")[:5])
            raise UserError(f"students: timm has no model {model!r}; close: {close or 'none'}")
        return lambda classes: timm.create_model(model, num_classes=classes)
    raise UserError(f"students: {name!r} is unknown; allowed: {_GRAMMAR}")

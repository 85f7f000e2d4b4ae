"""ResNets of torchvision's topology, with the field's stems by image size."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from eval.students.norm import initialise_convolutions, instance_norm

if TYPE_CHECKING:
    from torchvision.models import ResNet

BLOCKS: dict[int, tuple[str, list[int]]] = {
    10: ("BasicBlock", [1, 1, 1, 1]),
    18: ("BasicBlock", [2, 2, 2, 2]),
    34: ("BasicBlock", [3, 4, 6, 3]),
    50: ("Bottleneck", [3, 4, 6, 3]),
    101: ("Bottleneck", [3, 4, 23, 3]),
}


def resnet_in(depth: int, num_classes: int, image_size: int) -> nn.Module:
    """ResNet-`depth` with instance norm, as the hard-label protocol trains it."""
    net = _resnet(depth, num_classes, instance_norm)
    _fit_stem(net, image_size)
    initialise_convolutions(net)
    return net


def resnet_bn(depth: int, num_classes: int, image_size: int) -> nn.Module:
    """ResNet-`depth` with batch norm, as the soft-label protocol trains it.

    Above 128 px it is torchvision's, initialisation included.
    """
    net = _resnet(depth, num_classes)
    if _fit_stem(net, image_size):
        initialise_convolutions(net.conv1)  # torchvision's own distribution for convolutions
    return net


def _resnet(depth: int, num_classes: int, norm: Callable[[int], nn.Module] | None = None) -> ResNet:
    from torchvision.models import resnet  # seconds to import, and other students need none of it

    block, layers = BLOCKS[depth]
    kind = getattr(resnet, block)
    return resnet.ResNet(kind, layers, num_classes=num_classes, norm_layer=norm)


def _fit_stem(net: ResNet, image_size: int) -> bool:
    """IDC's stems: 3x3 up to 64 px, without the max pool; 3x3 up to 128 px; else 7x7 of stride 2.

    The max pool is 3x3 of stride 2 wherever it stands. Was the stem changed?
    """
    if image_size > 128:
        return False
    net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    if image_size <= 64:
        net.maxpool = nn.Identity()
    return True

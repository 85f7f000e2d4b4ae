"""Instance norm as the field's networks have it, and their initialisation."""

from __future__ import annotations

import math

from torch import nn


def instance_norm(channels: int) -> nn.Module:
    """One group per channel, affine, eps 1e-5; no running statistics."""
    return nn.GroupNorm(channels, channels)


def initialise_convolutions(net: nn.Module) -> None:
    """Conv weights from N(0, sqrt(2 / (k k out))), the original ResNets' initialisation."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

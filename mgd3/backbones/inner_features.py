"""What a denoiser makes of x_t half-way: the output of one of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mgd3.runtime import checks


class _ReachedError(Exception):
    """Carries a layer's output out of the network; nothing after it is computed."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def layer_output(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """What `layer` gives while `run` runs the network that it belongs to, which stops there."""

    def leave(module: nn.Module, inputs: object, output: Tensor) -> None:
        raise _ReachedError(output)

    handle = layer.register_forward_hook(leave)
    try:
        run()
    except _ReachedError as reached:
        return reached.output
    finally:
        handle.remove()
    raise AssertionError("the layer is no part of what was run")


def mid_features(unet: Any, block: int, run: Callable[[], object]) -> Tensor:
    """The output of a U-Net's mid block, (B, h w, C): the only one that it shows, block 1."""
    checks.integer("block (a U-Net has its mid block alone)", block, minimum=1, maximum=1)
    return layer_output(unet.mid_block, run).flatten(2).transpose(1, 2).float()

"""What a denoiser makes of x_t half-way: the output of one of its layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from mgd3.backbones.denoiser import ConditionedUNet
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute


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


class MidBlockFeatures:
    """A U-Net's only features: the output of its mid block, block 1."""

    network: Any  # diffusers' UNet2DConditionModel
    compute: Compute
    feature_blocks = 1

    def features(self, x_t: Tensor, t: Tensor, class_ids: Tensor, block: int) -> Tensor:
        """The mid block's output, (B, h w, D), for x_t (B, C, h, w)."""
        checks.integer("block (a U-Net has its mid block alone)", block, minimum=1, maximum=1)
        inputs = self.compute.layout(x_t), t, *self._condition(class_ids)
        with self.compute.running():
            found = layer_output(self.network.mid_block, lambda: self._conditioned(*inputs))
        return found.flatten(2).transpose(1, 2).float()

    @property
    def _conditioned(self) -> nn.Module:
        """The network, called with x_t, t and what `_condition` gives."""
        return ConditionedUNet(self.network)

    def _condition(self, class_ids: Tensor) -> tuple[Tensor, ...]:
        """What the network is told of its classes: (B, tokens, D) to attend to, and the like."""
        raise NotImplementedError

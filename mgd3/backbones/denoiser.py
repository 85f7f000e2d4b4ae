"""A noise-predicting network as samplers run it: precision, held weights, compilation."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from mgd3.backbones.held_weights import HeldWeights
from mgd3.runtime.batching import ran_out_of_memory
from mgd3.runtime.compute import Compute, runs_as_written


class ConditionedUNet(nn.Module):
    """diffusers' UNet2DConditionModel, called as `Denoiser` calls a network."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """The prediction for x_t (B, C, h, w) given states (B, tokens, D) to attend to."""
        return self.unet(x_t, t, encoder_hidden_states=states, return_dict=False)[0]


class Denoiser:
    """Runs `network(x_t, t, *condition)` as `compute` says."""

    def __init__(self, network: nn.Module, compute: Compute) -> None:
        self._compute = compute
        self._held = HeldWeights(network, compute.autocast_type)
        self._rows = 0  # of the batches that the network is compiled for

    @cached_property
    def _compiled(self) -> nn.Module:
        return self._compute.compiled(self._held.current)

    def __call__(self, x_t: Tensor, t: Tensor, *condition: Tensor) -> Tensor:
        """The output for x_t (B, C, h, w), float32; t and each `condition` have B rows as well."""
        network, rows = self._held.current, len(x_t)
        inputs: tuple[Tensor, ...] = (x_t, t, *condition)
        if self._compute.compile and not runs_as_written():
            network = self._compiled
            inputs = self._filled(*inputs)
        try:
            with self._compute.running():
                out = network(*inputs)
        except (RuntimeError, MemoryError) as error:
            if ran_out_of_memory(error):
                self._rows = 0  # smaller batches are not to be filled up to this one
            raise
        return out[:rows].float()

    def _filled(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All with as many rows as the largest batch so far: a new size is compiled for minutes.

        The last batch of a run is the one that is smaller; its first row stands in.
        """
        count = len(inputs[0])
        short = self._rows - count
        if short <= 0:
            self._rows = count
            return inputs
        return tuple(torch.cat([rows, rows[:1].expand(short, *rows.shape[1:])]) for rows in inputs)

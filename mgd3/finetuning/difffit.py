"""DiffFit (Xie et al. 2023): fine-tuning a DiT's biases, class table and added channel scales.

The scales (gamma, ones at first) multiply the queries, keys, values and output of attention and
each residual branch of the first half of the blocks. All of them multiply a linear layer's output,
so after training they are folded into it and a plain DiT remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn


class DiffFit:
    """The tensors of a network that are fine-tuned."""

    def __init__(self, network: DiTTransformer2DModel) -> None:
        self.network = network
        self._scaled: dict[str, nn.Linear] = {}
        half = max(1, network.config.num_layers // 2)  # MinimaxDiffusion: 14 of 28
        for n, block in enumerate(network.transformer_blocks[:half]):
            attention = block.attn1
            for name, layer in (
                ("to_q", attention.to_q),
                ("to_k", attention.to_k),
                ("to_v", attention.to_v),
                ("projection", attention.to_out[0]),
                ("attention_branch", attention.to_out[0]),
                ("mlp_branch", block.ff.net[2]),
            ):
                self._scaled[f"gamma.{n}.{name}"] = layer
        self.gammas = {
            name: nn.Parameter(torch.ones(layer.out_features, device=layer.weight.device))
            for name, layer in self._scaled.items()
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trainable tensors by name: the network's own, each once, and the scales."""
        own = {
            name: parameter
            for name, parameter in self.network.named_parameters()
            if name.endswith(".bias") or "embedding_table" in name
        }
        return own | self.gammas

    @contextmanager
    def training(self) -> Iterator[None]:
        """The scales take effect, and gradients are kept, inside this block."""
        handles = [
            layer.register_forward_hook(_scale(self.gammas[name]))
            for name, layer in self._scaled.items()
        ]
        for parameter in self.parameters().values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.network.requires_grad_(False)

    @torch.no_grad()
    def fold(self) -> None:
        """Multiply the scales into their layers and set them to one."""
        for name, layer in self._scaled.items():
            gamma = self.gammas[name]
            layer.weight.mul_(gamma[:, None])
            if layer.bias is not None:
                layer.bias.mul_(gamma)
            gamma.fill_(1)


def _scale(gamma: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    return lambda layer, inputs, output: output * gamma.to(output)

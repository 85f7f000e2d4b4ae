"""Diffusion transformers (Peebles & Xie 2023) on diffusers' DiTTransformer2DModel.

Weights in three forms, one forward pass: a hub id, a local diffusers folder, or one file with
facebookresearch/DiT's own key names (`.pt`, or `.safetensors` as `scripts/train_backbone.py`
writes it, whose metadata holds the constructor's arguments and the classes it was trained on).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from mgd3 import checks
from mgd3.backbones.codecs import make_codec, pick_device
from mgd3.backbones.sources import (
    diffusers_source,
    find_file,
    load_pretrained,
    metadata_json,
    read_weights,
)
from mgd3.datasets import ClassInfo
from mgd3.schedule import linear_alphas_cumprod
from mgd3.types import Prediction, UserError

# facebookresearch/DiT's names on the left, diffusers' on the right; {n} is the block's number.
_SHARED = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_QKV = ("to_q", "to_k", "to_v")


class DiT:
    """A class-conditional diffusion transformer with its codec."""

    def __init__(
        self,
        weights: str,
        vae: str | None,
        image_size: int,
        num_heads: int = 16,
        device: str = "auto",
    ) -> None:
        """`vae` None means pixel space; `num_heads` is read from the file where it says so."""
        self.num_heads = checks.integer("backbone.num_heads", num_heads, minimum=1)
        self.device = pick_device(device)
        self.codec = make_codec(vae, image_size, self.device)
        self._path = find_file(str(weights))
        if self._path is None:
            self._source = diffusers_source("backbone.weights", weights)

    @cached_property
    def _loaded(self) -> tuple[DiTTransformer2DModel, list[str] | None]:
        """The network and the wnids of its label rows (None: ImageNet's 1000 indices)."""
        if self._path is None:
            network: Any = load_pretrained(
                "backbone.weights", self._source, subfolder="transformer"
            )
            as_trained(network)
            trained_on = None
        else:
            tensors, metadata = read_weights("backbone.weights", self._path)
            config: Any = metadata_json(metadata, "config") or {}
            network = from_original(tensors, config.get("num_heads", self.num_heads))
            trained_on = metadata_json(metadata, "classes")
        expected, got = self.codec.image_size // self.codec.downsampling, network.config.sample_size
        if got != expected:
            raise UserError(
                f"backbone.image_size={self.codec.image_size} gives {expected} x {expected} "
                f"latents, but backbone.weights={self._path or self._source} was trained on {got} "
                f"x {got}; set backbone.image_size={got * self.codec.downsampling}"
            )
        return network.to(self.device).eval().requires_grad_(False), trained_on  # type: ignore[return-value]

    @property
    def network(self) -> DiTTransformer2DModel:
        """The transformer, float32, in eval mode; loaded on first use."""
        return self._loaded[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        config = self.network.config
        return config.in_channels, config.sample_size, config.sample_size

    @property
    def alphas_cumprod(self) -> Tensor:
        """DiT's linear schedule, (1000,) float64."""
        return linear_alphas_cumprod()

    @property
    def null_class(self) -> int:
        """The row after the last class."""
        return int(self.network.config.num_embeds_ada_norm)

    def class_ids(self, classes: Sequence[ClassInfo]) -> list[int]:
        """ImageNet indices, or the position among the classes that the weights were trained on."""
        trained_on = self._loaded[1]
        if trained_on is None:
            unknown = [c.wnid for c in classes if c.imagenet_id is None]
            what = "is conditioned on ImageNet's 1000 classes"
        else:
            unknown = [c.wnid for c in classes if c.wnid not in trained_on]
            what = f"was trained on {', '.join(trained_on)}"
        if unknown:
            raise UserError(
                f"backbone.weights={self._path or self._source} {what} and does not know the "
                f"class {unknown[0]!r} of this dataset; choose another backbone, or train one on "
                "your own images with scripts/train_backbone.py"
            )
        if trained_on is None:
            return [c.imagenet_id for c in classes if c.imagenet_id is not None]
        return [trained_on.index(c.wnid) for c in classes]

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """Noise and, where the network learned it, variance for x_t (B, C, h, w)."""
        out = self.network(x_t, timestep=t, class_labels=class_ids, return_dict=False)[0]
        channels = x_t.shape[1]
        variance = out[:, channels:] if out.shape[1] > channels else None
        return Prediction(eps=out[:, :channels], variance=variance)


def as_trained(network: DiTTransformer2DModel) -> None:
    """Undo two of diffusers' departures from the network that was trained.

    DiT's timestep frequencies are exp(-ln(10000) k / 128), diffusers' port divides by 127; its
    second LayerNorm has eps 1e-6, the port's default is 1e-5.
    """
    for block in network.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6


def build_network(
    input_size: int,
    patch_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    num_classes: int,
    mlp_ratio: float = 4.0,
    learn_sigma: bool = True,
) -> DiTTransformer2DModel:
    """A DiT by its original constructor's arguments, one embedder shared by all blocks."""
    if mlp_ratio != 4.0:
        raise UserError(f"mlp_ratio={mlp_ratio}: diffusers' DiT has 4.0 built in")
    network = DiTTransformer2DModel(
        num_attention_heads=num_heads,
        attention_head_dim=hidden_size // num_heads,
        in_channels=in_channels,
        out_channels=in_channels * (2 if learn_sigma else 1),
        num_layers=depth,
        sample_size=input_size,
        patch_size=patch_size,
        num_embeds_ada_norm=num_classes,
        norm_eps=1e-6,
    )
    first = network.transformer_blocks[0].norm1
    for block in network.transformer_blocks[1:]:
        block.norm1.emb = first.emb
    as_trained(network)
    return network


def from_original(tensors: dict[str, Tensor], num_heads: int) -> DiTTransformer2DModel:
    """A network from facebookresearch's state dict; every size but the heads is in the shapes."""
    try:
        hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        tokens = tensors["pos_embed"].shape[1]
        depth = 1 + max(int(m[1]) for k in tensors if (m := re.match(r"blocks\.(\d+)\.", k)))
        out_channels = tensors["final_layer.linear.weight"].shape[0] // patch_size**2
        num_classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
    except (KeyError, ValueError) as error:
        raise UserError(
            "backbone.weights: not a DiT checkpoint in facebookresearch's layout "
            f"({error} is missing); keys start with: {', '.join(list(tensors)[:3])}"
        ) from error
    network = build_network(
        input_size=round(tokens**0.5) * patch_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=depth,
        num_heads=num_heads,
        num_classes=num_classes,
        learn_sigma=out_channels == 2 * in_channels,
    )
    try:
        network.load_state_dict(_to_diffusers(tensors, depth), strict=True)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"backbone.weights: the checkpoint does not fit a DiT: {error}") from error
    network.pos_embed.pos_embed.copy_(tensors["pos_embed"].float())
    return network


def to_original(network: DiTTransformer2DModel) -> dict[str, Tensor]:
    """The state dict of `build_network`'s result under facebookresearch's names."""
    state = network.state_dict()
    tensors = {"pos_embed": network.pos_embed.pos_embed}
    for original, ours in [
        *_SHARED.items(),
        *((o, f"transformer_blocks.0.{d}") for o, d in _EMBEDDERS.items()),
    ]:
        tensors |= _renamed(state, ours, original)
    for n in range(network.config.num_layers):
        ours = f"transformer_blocks.{n}"
        for original, name in _BLOCK.items():
            tensors |= _renamed(state, f"{ours}.{name}", f"blocks.{n}.{original}")
        for kind in ("weight", "bias"):
            parts = [state[f"{ours}.attn1.{name}.{kind}"] for name in _QKV]
            tensors[f"blocks.{n}.attn.qkv.{kind}"] = torch.cat(parts)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _to_diffusers(tensors: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    rest = {k: v for k, v in tensors.items() if k != "pos_embed"}
    state: dict[str, Tensor] = {}

    def move(original: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            if f"{original}.{kind}" in rest:
                value = rest.pop(f"{original}.{kind}").float()
                state.update({f"{name}.{kind}": value for name in ours})

    for original, name in _SHARED.items():
        move(original, name)
    for original, name in _EMBEDDERS.items():
        move(original, *(f"transformer_blocks.{n}.{name}" for n in range(depth)))
    for n in range(depth):
        for original, name in _BLOCK.items():
            move(f"blocks.{n}.{original}", f"transformer_blocks.{n}.{name}")
        for kind in ("weight", "bias"):
            parts = rest.pop(f"blocks.{n}.attn.qkv.{kind}").float().chunk(3)
            for name, part in zip(_QKV, parts, strict=True):
                state[f"transformer_blocks.{n}.attn1.{name}.{kind}"] = part
    return state | rest  # what is left over makes the strict load fail by its own name


def _renamed(state: dict[str, Tensor], ours: str, original: str) -> dict[str, Tensor]:
    kinds = [k for k in ("weight", "bias") if f"{ours}.{k}" in state]
    return {f"{original}.{kind}": state[f"{ours}.{kind}"] for kind in kinds}


def constructor_arguments(network: DiTTransformer2DModel) -> str:
    """The original constructor's arguments as JSON, for a safetensors file's metadata."""
    config = network.config
    return json.dumps(
        {
            "input_size": config.sample_size,
            "patch_size": config.patch_size,
            "in_channels": config.in_channels,
            "hidden_size": config.num_attention_heads * config.attention_head_dim,
            "depth": config.num_layers,
            "num_heads": config.num_attention_heads,
            "mlp_ratio": 4.0,
            "num_classes": config.num_embeds_ada_norm,
            "learn_sigma": config.out_channels == 2 * config.in_channels,
        }
    )

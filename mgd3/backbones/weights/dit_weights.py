"""DiT networks from and to facebookresearch's checkpoint layout, on diffusers' module."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mgd3.backbones.weights.dit_embedding import SharedEmbedder
from mgd3.runtime.errors import UserError
from mgd3.storage.checkpoints import load_strictly, refuse_tensors

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

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
_PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # DiT-S, -B, -L, -XL: heads by width


def as_trained(network: DiTTransformer2DModel) -> None:
    """Undo three of diffusers' departures from the network that was trained.

    DiT's timestep frequencies are exp(-ln(10000) k / 128), diffusers' port divides by 127; its
    second LayerNorm has eps 1e-6, the port's default is 1e-5; its one embedder of timesteps and
    classes has a copy in every block of the port.
    """
    first = network.transformer_blocks[0].norm1
    embedder = first.emb.state_dict()
    for block in network.transformer_blocks[1:]:
        copy = block.norm1.emb.state_dict()
        if all(torch.equal(copy[k], v) for k, v in embedder.items()):
            block.norm1.emb = first.emb
    if all(block.norm1.emb is first.emb for block in network.transformer_blocks):
        shared = SharedEmbedder(first.emb)
        for block in network.transformer_blocks:
            block.norm1.emb = shared
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
    learn_sigma: bool = True,
) -> DiTTransformer2DModel:
    """A DiT by its original constructor's arguments, one embedder shared by all blocks."""
    if hidden_size % num_heads:
        raise UserError(f"hidden_size={hidden_size} is not a multiple of num_heads={num_heads}")
    from diffusers import DiTTransformer2DModel

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


def from_original(
    tensors: dict[str, Tensor], num_heads: int, source: str = "the checkpoint"
) -> DiTTransformer2DModel:
    """A network from facebookresearch's state dict; every size but the heads is in the shapes."""
    try:
        hidden_size, in_channels, patch_size, _ = tensors["x_embedder.proj.weight"].shape
        tokens = tensors["pos_embed"].shape[1]
        _ = tensors["blocks.0.attn.qkv.weight"]
        depth = 1 + max(int(m[1]) for k in tensors if (m := re.match(r"blocks\.(\d+)\.", k)))
        out_channels = tensors["final_layer.linear.weight"].shape[0] // patch_size**2
        num_classes = tensors["y_embedder.embedding_table.weight"].shape[0] - 1
        if tokens == 0:
            raise ValueError("pos_embed has no tokens")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{source} is not a DiT checkpoint in facebookresearch's layout ({error}); its "
            f"keys start with: {', '.join(list(tensors)[:3])}"
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
    load_strictly(network, _to_diffusers(tensors, depth, source), source)
    table, given = network.pos_embed.pos_embed, tensors["pos_embed"]
    if table.shape != given.shape:
        expected = f"pos_embed is {tuple(given.shape)}, not {tuple(table.shape)}"
        refuse_tensors(source, [], [], [expected])
    table.copy_(given.float())
    return network


def require_published_heads(tensors: dict[str, Tensor], num_heads: int, source: str) -> None:
    """Heads leave no trace in the shapes; refuse another number than the published width has."""
    width = tensors["pos_embed"].shape[-1]
    published = _PUBLISHED_HEADS.get(width, num_heads)
    if num_heads != published:
        raise UserError(
            f"{source} is {width} wide, a DiT with {published} heads, not {num_heads}, and the "
            f"file does not say; set backbone.num_heads={published}"
        )


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


def _to_diffusers(tensors: dict[str, Tensor], depth: int, source: str) -> dict[str, Tensor]:
    rest = {k: v for k, v in tensors.items() if k != "pos_embed"}
    state: dict[str, Tensor] = {}

    def move(original: str, *ours: str) -> None:
        for kind in ("weight", "bias"):
            if f"{original}.{kind}" in rest:
                value = rest.pop(f"{original}.{kind}")
                state.update({f"{name}.{kind}": value for name in ours})

    for original, name in _SHARED.items():
        move(original, name)
    for original, name in _EMBEDDERS.items():
        move(original, *(f"transformer_blocks.{n}.{name}" for n in range(depth)))
    for n in range(depth):
        for original, name in _BLOCK.items():
            move(f"blocks.{n}.{original}", f"transformer_blocks.{n}.{name}")
        for kind in ("weight", "bias"):
            stacked = f"blocks.{n}.attn.qkv.{kind}"
            if stacked in rest:
                if len(rest[stacked]) % 3:
                    rows = f"{stacked} has {len(rest[stacked])} rows, not three equal parts"
                    refuse_tensors(source, [], [], [rows])
                for name, part in zip(_QKV, rest.pop(stacked).chunk(3), strict=True):
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

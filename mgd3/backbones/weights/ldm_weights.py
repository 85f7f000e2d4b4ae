"""CompVis/latent-diffusion checkpoints, converted once to diffusers' modules.

Every size but the number of heads is read from the tensors' shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel, VQModel
from torch import Tensor

from mgd3.runtime.errors import UserError
from mgd3.storage.cache import cached
from mgd3.storage.checkpoints import load_strictly, read_weights, refuse_tensors
from mgd3.storage.digests import stamp_digest

_UNET, _VQ, _CLASSES = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# Buffers that CompVis's model derives from its betas, and a scalar of its training.
_SCHEDULE = (
    "betas", "alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
    "posterior_", "lvlb_weights", "logvar", "scale_factor",
)  # fmt: skip
_PARTS = ("unet", "vq", "classes", "schedule")


@dataclass(frozen=True)
class LDMNetworks:
    """What a class-conditional latent diffusion model consists of."""

    unet: UNet2DConditionModel
    vq: VQModel
    classes: Tensor  # (classes + 1, D) embeddings; the last row is «no class»
    alphas_cumprod: Tensor  # (T,) float64


def load_ldm(path: Path, num_heads: int, cache: Path) -> LDMNetworks:
    """The networks of a `model.ckpt`; its converted tensors are kept in `cache`/weights."""
    source = f"backbone.weights={path}"
    converted = cache / "weights" / f"{path.stem}-{stamp_digest(path)}.safetensors"
    tensors: dict[str, Tensor] = cached(
        converted,
        {"made_from": path.name},
        lambda: _convert(read_weights("backbone.weights", path)[0], source),
    )
    parts = {
        part: {
            k.removeprefix(f"{part}."): v for k, v in tensors.items() if k.startswith(f"{part}.")
        }
        for part in _PARTS
    }
    embeddings, abar = parts["classes"]["embedding"], parts["schedule"]["alphas_cumprod"]
    try:
        unet = UNet2DConditionModel(**_unet_config(parts["unet"], num_heads))
        vq = VQModel(**_vq_config(parts["vq"]))
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"{source} is of no size that can be built: {error}") from error
    load_strictly(unet, parts["unet"], source)
    load_strictly(vq, parts["vq"], source)
    for what, got, expected in (
        ("columns of the class embedding", embeddings.shape[-1], unet.config.cross_attention_dim),
        ("channels of the unet's input", unet.config.in_channels, vq.config.vq_embed_dim),
        ("timesteps of alphas_cumprod", len(abar), 1000),
    ):
        if got != expected:
            raise UserError(f"{source}: {got} {what}, {expected} are needed")
    return LDMNetworks(unet=unet, vq=vq, classes=embeddings.float(), alphas_cumprod=abar.double())


def _convert(tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """CompVis's names to diffusers'; the averaged weights where the checkpoint has them."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_unet_checkpoint,
        convert_ldm_vae_checkpoint,
    )

    needed = (
        f"{_UNET}input_blocks.0.0.weight",
        f"{_VQ}quantize.embedding.weight",
        f"{_CLASSES}embedding.weight",
        "alphas_cumprod",
    )
    absent = [key for key in needed if key not in tensors]
    if absent:
        raise UserError(
            f"{source} is not a class-conditional latent diffusion checkpoint of CompVis: "
            f"{', '.join(absent)} missing; its keys start with: {', '.join(list(tensors)[:3])}"
        )
    unet = {k.removeprefix(_UNET): v for k, v in tensors.items() if k.startswith(_UNET)}
    averaged = {k: tensors.get(f"model_ema.diffusion_model{k.replace('.', '')}") for k in unet}
    if all(v is not None for v in averaged.values()):  # the original samples within `ema_scope`
        unet = {k: v for k, v in averaged.items() if v is not None}
    first_stage = {k: v for k, v in tensors.items() if k.startswith(_VQ)}
    try:
        new_unet = convert_ldm_unet_checkpoint(
            {_UNET + k: v for k, v in unet.items()}, {"layers_per_block": _unet_sizes(unet).blocks}
        )
        levels = _levels(first_stage, rf"{_VQ}encoder\.down\.(\d+)\.")
        blocks = ["block"] * levels
        new_vq = convert_ldm_vae_checkpoint(
            first_stage, {"down_block_types": blocks, "up_block_types": blocks}
        )
        new_vq["quantize.embedding.weight"] = tensors[f"{_VQ}quantize.embedding.weight"]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{source} is not a checkpoint of this network; it lacks {error}"
        ) from error
    _refuse_unknown(source, {_UNET + k: v for k, v in unet.items()}, new_unet)
    _refuse_unknown(source, first_stage, new_vq)
    known = (_UNET, _VQ, f"{_CLASSES}embedding.weight", "model_ema.", *_SCHEDULE)
    refuse_tensors(source, [], [k for k in tensors if not k.startswith(known)], [])
    return {
        **{f"unet.{k}": v for k, v in new_unet.items()},
        **{f"vq.{k}": v for k, v in new_vq.items()},
        "classes.embedding": tensors[f"{_CLASSES}embedding.weight"],
        "schedule.alphas_cumprod": tensors["alphas_cumprod"],
    }


def _refuse_unknown(
    source: str, original: Mapping[str, Tensor], converted: Mapping[str, Tensor]
) -> None:
    """Renaming keeps the memory, so what no new name refers to has been left out."""
    used = {tensor.data_ptr() for tensor in converted.values()}
    unknown = [k for k, v in original.items() if v.data_ptr() not in used]
    if unknown:
        raise UserError(
            f"{source} is not a checkpoint of this network: {len(unknown)} unknown tensors "
            f"({'; '.join(unknown[:3])})"
        )


@dataclass(frozen=True)
class _UNetSizes:
    channels: list[int]  # of each level
    attention: list[bool]  # whether a level has cross-attention
    blocks: int  # residual blocks per level


def _unet_sizes(unet: Mapping[str, Tensor]) -> _UNetSizes:
    """Walks CompVis's numbered input blocks: 0 is the first convolution, `op` ends a level."""
    channels, attention, blocks = [], [], []
    count = 0
    for n in range(1, _levels(unet, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{n}.0.op.weight" in unet:
            blocks.append(count)
            count = 0
            continue
        if count == 0:
            channels.append(unet[f"input_blocks.{n}.0.out_layers.3.weight"].shape[0])
            attention.append(f"input_blocks.{n}.1.norm.weight" in unet)
        count += 1
    return _UNetSizes(channels, attention, max([*blocks, count]))


def _unet_config(unet: Mapping[str, Tensor], num_heads: int) -> dict[str, Any]:
    """UNet2DConditionModel's arguments, from tensors under diffusers' names."""
    levels = range(_levels(unet, r"down_blocks\.(\d+)\."))
    crossed = [f"down_blocks.{n}.attentions.0.norm.weight" in unet for n in levels]
    channels = [unet[f"down_blocks.{n}.resnets.0.conv2.weight"].shape[0] for n in levels]
    keys = [v.shape[1] for k, v in unet.items() if k.endswith("attn2.to_k.weight")]
    return {
        "in_channels": unet["conv_in.weight"].shape[1],
        "out_channels": unet["conv_out.weight"].shape[0],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed],
        "up_block_types": ["CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)],
        "layers_per_block": _levels(unet, r"down_blocks\.0\.resnets\.(\d+)\."),
        "transformer_layers_per_block": _levels(unet, r".*transformer_blocks\.(\d+)\."),
        "cross_attention_dim": keys[0],
        "attention_head_dim": num_heads,  # diffusers' name for the number of heads
        "norm_num_groups": 32,
    }


def _vq_config(vq: Mapping[str, Tensor]) -> dict[str, Any]:
    """VQModel's arguments, from tensors under diffusers' names."""
    levels = range(_levels(vq, r"encoder\.down_blocks\.(\d+)\."))
    codes, dimension = vq["quantize.embedding.weight"].shape
    return {
        "down_block_types": ["DownEncoderBlock2D" for _ in levels],
        "up_block_types": ["UpDecoderBlock2D" for _ in levels],
        "block_out_channels": [
            vq[f"encoder.down_blocks.{n}.resnets.0.conv2.weight"].shape[0] for n in levels
        ],
        "layers_per_block": _levels(vq, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        "latent_channels": vq["encoder.conv_out.weight"].shape[0],
        "num_vq_embeddings": codes,
        "vq_embed_dim": dimension,
        "scaling_factor": 1.0,  # CompVis's VQ latents are used as they are
    }


def _levels(names: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers the pattern's group takes."""
    return 1 + max(int(m[1]) for name in names if (m := re.match(pattern, name)))

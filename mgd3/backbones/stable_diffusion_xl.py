"""Stable Diffusion XL (Podell et al. 2023): two text encoders, and what sizes a picture had."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from mgd3.backbones.prompts import encode_prompts_twice
from mgd3.backbones.stable_diffusion import StableDiffusion
from mgd3.backbones.weights.sources import at_hand, load_config
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError

_NUM_SIZES = (
    6  # height and width of the original, top and left of the crop, height and width aimed at
)


class TextTimeUNet(nn.Module):
    """diffusers' UNet2DConditionModel of SDXL, called as `Denoiser` calls a network."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, t: Tensor, states: Tensor, pooled: Tensor, sizes: Tensor) -> Any:
        """The prediction for x_t (B, C, h, w).

        It attends to states (B, tokens, D); pooled (B, P) and sizes (B, 6) join the timestep.
        """
        added = {"text_embeds": pooled, "time_ids": sizes}
        return self.unet(
            x_t, t, encoder_hidden_states=states, added_cond_kwargs=added, return_dict=False
        )[0]


class StableDiffusionXL(StableDiffusion):
    """SDXL: a prompt's states from two encoders, its pooled embedding, and sizes in pixels.

    Sizes (micro-conditioning, Podell et al. 2023, 2.2) are those of the picture that a training
    image came from, the corner that it was cut out at, and `image_size`. An empty prompt, such as
    no negative one, is zeros with the same sizes, where the pipeline asks for that.
    """

    _text_parts = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

    def __init__(
        self,
        weights: str,
        image_size: int = 1024,
        output_size: int = 256,
        prompt: str = "{name}",
        negative_prompt: str = "",
        latents: str = "mean",
        vae: str | None = None,
        original_size: Sequence[int] | None = None,
        crop: Sequence[int] = (0, 0),
        compute: Compute | None = None,
    ) -> None:
        """`original_size` (height, width), None as `image_size`; `crop` (top, left)."""
        super().__init__(
            weights, image_size, output_size, prompt, negative_prompt, latents, vae, compute
        )
        original = (image_size, image_size) if original_size is None else original_size
        sizes = [
            *_pair("backbone.original_size", original, "height, width", minimum=1),
            *_pair("backbone.crop", crop, "top, left", minimum=0),
            *(image_size, image_size),
        ]
        # plain text: caches and the API's identity read attributes
        self.sizes = ", ".join(map(str, sizes))
        self._sizes = torch.tensor(sizes, dtype=torch.float32)

    @property
    def _conditioned(self) -> nn.Module:
        return TextTimeUNet(self.network)

    def _require_conditioning(self, network: Any) -> None:
        told = f"backbone.weights={self._source}"
        kind = getattr(getattr(network, "config", None), "addition_embed_type", None)
        if not isinstance(network, UNet2DConditionModel) or kind != "text_time":
            other = "; Stable Diffusion 1 and 2 are backbone=sd15" if kind is None else ""
            raise UserError(
                f"{told} is not Stable Diffusion XL: its unet takes no pooled text{other}"
            )
        width = network.config.projection_class_embeddings_input_dim
        pooled = width - _NUM_SIZES * network.config.addition_time_embed_dim
        projected = self._projection_dim
        if pooled != projected:
            raise UserError(
                f"{told}: its unet takes {pooled} numbers of pooled text beside {_NUM_SIZES} "
                f"sizes, its text_encoder_2 gives {projected}; use a base model, no refiner"
            )

    @property
    def _projection_dim(self) -> int:
        folder = at_hand("backbone.weights", self._source, "text_encoder_2")
        config = load_config("backbone.weights", folder, "text_encoder_2", "config.json")
        return int(config.get("projection_dim", 0))

    @property
    def _zeros_without_prompt(self) -> bool:
        folder = at_hand("backbone.weights", self._source, "text_encoder_2")
        if not (folder / "model_index.json").is_file():
            return True  # diffusers' own default
        config = load_config("backbone.weights", folder, "", "model_index.json")
        return bool(config.get("force_zeros_for_empty_prompt", True))

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """States (P, tokens, D), pooled embeddings (P, D) and sizes (P, 6)."""
        states, pooled = encode_prompts_twice(prompts, self._source, self.compute)
        if self._zeros_without_prompt:
            said = torch.tensor([bool(prompt) for prompt in prompts]).to(pooled)
            states, pooled = states * said[:, None, None], pooled * said[:, None]
        return states, pooled, self._sizes.to(pooled).expand(len(prompts), -1)


def _pair(key: str, values: object, meaning: str, minimum: int) -> list[int]:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != 2:
        raise UserError(f"{key}={values!r} is not [{meaning}], two whole numbers of pixels")
    return [checks.integer(key, value, minimum=minimum) for value in values]

"""Text-to-image latent diffusion: any Stable Diffusion pipeline in diffusers' format."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from mgd3.backbones.codecs import VAECodec
from mgd3.backbones.contract import Prediction
from mgd3.backbones.denoiser import Denoiser
from mgd3.backbones.inner_features import MidBlockFeatures
from mgd3.backbones.prompts import PromptTemplate, encode_prompts
from mgd3.backbones.schedule import NoiseSchedule
from mgd3.backbones.weights.sources import at_hand, diffusers_source, load_config, load_pretrained
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError
from mgd3.storage.digests import folder_digest

log = logging.getLogger(__name__)

_SPACINGS = {"linspace": "even", "leading": "leading", "trailing": "trailing"}


class StableDiffusion(MidBlockFeatures):
    """A UNet conditioned on each class's prompt; row 0 of its conditioning is the negative prompt.

    The text encoder runs once per prompt and is then let go. Images are made at `image_size` and
    written at `output_size` (the released script: 512, reduced to 256).
    """

    null_class = 0
    _text_parts: tuple[str, ...] = ("text_encoder", "tokenizer")  # folders of a pipeline

    def __init__(
        self,
        weights: str,
        image_size: int = 512,
        output_size: int = 256,
        prompt: str = "{name}",
        negative_prompt: str = "",
        latents: str = "sample",
        vae: str | None = None,
        compute: Compute | None = None,
    ) -> None:
        """`vae` None takes the pipeline's own; `prompt` is a `PromptTemplate`."""
        self.weights, self.vae, self.image_size = weights, vae, image_size
        self.output_size, self.latents = output_size, latents
        self.negative_prompt, self.prompt = negative_prompt, prompt
        self._prompt_of = PromptTemplate(prompt)
        if not isinstance(negative_prompt, str):
            raise UserError(f"backbone.negative_prompt={negative_prompt!r} is not text")
        self.compute = compute or Compute()
        self.device, self.precision = self.compute.torch_device, self.compute.precision
        self._source = diffusers_source("backbone.weights", weights)
        self._require_parts(vae)
        key, source = ("backbone.weights", self._source)
        if vae is not None:
            key, source = "backbone.vae", diffusers_source("backbone.vae", vae)
        self.codec = VAECodec(
            lambda: load_pretrained(key, source, "vae", alone=vae is not None),
            image_size,
            latents=latents,
            output_size=output_size,
            compute=self.compute,
        )
        self._rows = {negative_prompt: self.null_class}  # by prompt
        self._table: tuple[Tensor, ...] = ()  # of `_encode`, with a row per prompt

    @cached_property
    def network(self) -> UNet2DConditionModel:
        """The UNet, float32, in eval mode; loaded on first use."""
        network = load_pretrained("backbone.weights", self._source, "unet", alone=False)
        channels = self.codec.latent_channels
        self._require_conditioning(network)
        if network.config.time_cond_proj_dim:
            raise UserError(
                f"backbone.weights={self._source}: its unet is told the guidance scale, as those "
                "distilled to few steps are; take the model that it was distilled from"
            )
        if network.config.in_channels != channels:
            raise UserError(
                f"backbone.weights={self._source}: its unet takes {network.config.in_channels} "
                f"channels, its latents have {channels}; an inpainting model cannot be used"
            )
        return self.compute.place(network)

    def _require_conditioning(self, network: Any) -> None:
        """`UserError` for a network that is told of more, or of less, than this class tells it."""
        if not isinstance(network, UNet2DConditionModel) or network.config.addition_embed_type:
            raise UserError(
                f"backbone.weights={self._source} is not Stable Diffusion 1 or 2: its unet is "
                f"conditioned on more than one text encoder's states ({type(network).__name__}); "
                "SDXL is backbone=sdxl"
            )

    @cached_property
    def _denoiser(self) -> Denoiser:
        return Denoiser(self._conditioned, self.compute)

    @cached_property
    def _abar(self) -> Tensor:
        return self.schedule.alphas_cumprod.to(self.device)

    @cached_property
    def _scheduler(self) -> dict[str, Any]:
        name = "scheduler_config.json"
        folder = at_hand("backbone.weights", self._source, "scheduler")
        config = load_config("backbone.weights", folder, "scheduler", name)
        checks.choice(
            f"prediction_type of {self._source}/scheduler",
            config.get("prediction_type", "epsilon"),
            ["epsilon", "v_prediction"],
        )
        return config

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        side = self.codec.image_size // self.codec.downsampling
        return self.codec.latent_channels, side, side

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The checkpoint's noise; steps are spaced as diffusers' schedulers space them.

        SD 1.5: t = 981, 961 ... 1 for 50 steps («leading», offset 1).
        """
        made = DDPMScheduler.from_config(self._scheduler)
        abar = made.alphas_cumprod.double()
        to_one = self._scheduler.get("set_alpha_to_one", True)
        return NoiseSchedule(
            alphas_cumprod=abar,
            spacing=_SPACINGS[made.config.timestep_spacing],
            offset=int(made.config.steps_offset),
            final_abar=1.0 if to_one else abar[0].item(),
        )

    def class_ids(self, classes: Sequence[ClassInfo]) -> list[int]:
        """Rows of the classes' prompts, encoded now unless they have been."""
        prompts = [self._prompt_of(info) for info in classes]
        for prompt, count in Counter(prompts).items():
            if count > 1:
                log.warning("%d classes have the same prompt: %r", count, prompt)
        return self.prompt_ids(prompts)

    def prompt_ids(self, prompts: Sequence[str]) -> list[int]:
        """Rows of these prompts in the conditioning table, encoded now unless they have been."""
        rows = list(dict.fromkeys([*self._rows, *prompts]))
        known = len(self._table[0]) if self._table else 0
        if len(rows) > known:
            new = self._encode(rows[known:])
            joined = (torch.cat(parts) for parts in zip(self._table, new, strict=True))
            self._table = tuple(joined) if self._table else new
            self._rows = {prompt: row for row, prompt in enumerate(rows)}
        return [self._rows[prompt] for prompt in prompts]

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, ...]:
        """What the network is told of each prompt: states (P, tokens, D)."""
        return (encode_prompts(prompts, self._source, self.compute),)

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """The noise in x_t (B, C, h, w); a network may also predict v = alpha eps - sigma x0."""
        out = self._denoiser(self.compute.layout(x_t), t, *self._condition(class_ids))
        if self.prediction_type == "epsilon":
            return Prediction(eps=out)
        abar = self._abar[t].to(x_t).view(-1, 1, 1, 1)
        return Prediction(eps=abar.sqrt() * out + (1 - abar).sqrt() * x_t)

    @property
    def prediction_type(self) -> str:
        """What the network predicts: epsilon or v_prediction."""
        return str(self._scheduler.get("prediction_type", "epsilon"))

    def told_of(self, class_ids: Sequence[int]) -> str:
        """Identifies what the network is told of these rows: their prompts, and who reads them."""
        prompts = {row: prompt for prompt, row in self._rows.items()}
        return json.dumps([[prompts[row] for row in class_ids], self._readers])

    @cached_property
    def _readers(self) -> list[str]:
        """Digests of the folders of text encoders and tokenizers."""
        parts = self._text_parts
        folders = [at_hand("backbone.weights", self._source, part) / part for part in parts]
        return [folder_digest(folder) for folder in folders]

    def _condition(self, class_ids: Tensor) -> tuple[Tensor, ...]:
        rows = class_ids.to(self._table[0].device)
        return tuple(part[rows] for part in self._table)

    def _require_parts(self, vae: str | None) -> None:
        folder = Path(self._source)
        if not folder.is_dir():
            return
        parts = [
            "unet",
            *self._text_parts,
            "scheduler",
            *(["vae"] if vae is None else []),
        ]
        absent = [part for part in parts if not (folder / part).is_dir()]
        if absent:
            hint = "; backbone.vae=FOLDER_OR_HUB_ID gives one" if "vae" in absent else ""
            raise UserError(
                f"backbone.weights={folder} is not a whole Stable Diffusion pipeline: "
                f"{', '.join(absent)} missing{hint}; expected the folders {', '.join(parts)}"
            )

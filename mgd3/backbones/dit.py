"""Diffusion transformers (Peebles & Xie 2023) on diffusers' DiTTransformer2DModel.

Weights in three forms, one forward pass: a hub id, a local diffusers folder, or one file (or its
https address) with facebookresearch/DiT's own key names (`.pt`, or `.safetensors` as
`scripts/train_backbone.py` writes it, whose metadata holds the constructor's arguments and the
classes it was trained on).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, Field
from torch import Tensor

from mgd3.backbones.codecs import make_codec
from mgd3.backbones.contract import Prediction
from mgd3.backbones.denoiser import Denoiser
from mgd3.backbones.inner_features import layer_output
from mgd3.backbones.labels import label_rows, require_imagenet
from mgd3.backbones.schedule import NoiseSchedule, linear_alphas_cumprod
from mgd3.backbones.weights.dit_embedding import EmbeddedOnce
from mgd3.backbones.weights.dit_weights import as_trained, from_original, require_published_heads
from mgd3.backbones.weights.sources import diffusers_source, find_file, load_pretrained
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError, reading
from mgd3.storage.checkpoints import metadata_json, read_weights

if TYPE_CHECKING:  # seconds to import, and a finished run needs none of it
    from diffusers import DiTTransformer2DModel


class BareDiT:
    """A transformer as samplers need it: without a codec and without names of its classes."""

    def __init__(self, network: DiTTransformer2DModel, compute: Compute) -> None:
        self.network = network
        self.compute = compute
        self.device, self.precision = compute.torch_device, compute.precision
        self._embedded = EmbeddedOnce(network)
        self._denoiser = Denoiser(self._embedded, compute)
        self.schedule = NoiseSchedule(alphas_cumprod=linear_alphas_cumprod())
        self.null_class = int(network.config.num_embeds_ada_norm)  # the row after the last class
        self.learned_variance = network.config.out_channels == 2 * network.config.in_channels
        side = network.config.sample_size
        self.latent_shape = (network.config.in_channels, side, side)  # (C, h, w)

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """Noise and, where the network learned it, variance for x_t (B, C, h, w)."""
        out = self._denoiser(x_t, t, class_ids)
        eps, *variance = out.split(x_t.shape[1], dim=1)
        return Prediction(eps=eps, variance=variance[0] if variance else None)

    @property
    def feature_blocks(self) -> int:
        """All transformer blocks."""
        return len(self.network.transformer_blocks)

    def features(self, x_t: Tensor, t: Tensor, class_ids: Tensor, block: int) -> Tensor:
        """Block 1, 2 ...'s output, (B, tokens, D), for x_t (B, C, h, w)."""
        checks.integer("block", block, minimum=1, maximum=self.feature_blocks)
        with self.compute.running():
            return layer_output(
                self.network.transformer_blocks[block - 1],
                lambda: self._embedded(x_t, t, class_ids),
            ).float()


class _Config(BaseModel):
    """What a file's metadata says of its network."""

    num_heads: Annotated[int, Field(ge=1)] | None = None


class DiT:
    """A class-conditional diffusion transformer with its codec."""

    def __init__(
        self,
        weights: str,
        vae: str | None,
        image_size: int,
        num_heads: int = 16,
        latents: str = "mean",
        finetuning_vae: str | None = None,
        compute: Compute | None = None,
    ) -> None:
        """`vae` None means pixel space; `num_heads` is read from the file where it says so.

        `finetuning_vae` encodes images for fine-tuning in place of `vae`.
        """
        self.weights, self.vae, self.image_size = str(weights), vae, image_size
        self.latents = latents
        self.num_heads = checks.integer("backbone.num_heads", num_heads, minimum=1)
        self.compute = compute or Compute()
        self.device, self.precision = self.compute.torch_device, self.compute.precision
        self.codec = make_codec(vae, image_size, latents, self.compute)
        self.finetuning_codec = (
            self.codec
            if finetuning_vae is None
            else make_codec(finetuning_vae, image_size, "mean", self.compute, "finetuning_vae")
        )
        self._path = find_file("backbone.weights", str(weights))
        if self._path is None:
            self._source = diffusers_source("backbone.weights", weights)

    @cached_property
    def _loaded(self) -> tuple[BareDiT, list[str] | None]:
        """The network and the wnids of its label rows (None: ImageNet's 1000 indices)."""
        trained_on = None
        if self._path is None:
            from diffusers import DiTTransformer2DModel

            network = load_pretrained("backbone.weights", self._source, "transformer")
            if not isinstance(network, DiTTransformer2DModel):
                raise UserError(f"{self._name} is a {type(network).__name__}, not a DiT")
            as_trained(network)
        else:
            with reading(self._path, "fetch the file again, or give another backbone.weights"):
                network, trained_on = self._from_file(self._path)
        factor, size = self.codec.downsampling, network.config.sample_size
        if self.codec.image_size != size * factor:
            raise UserError(
                f"backbone.image_size={self.codec.image_size} gives "
                f"{self.codec.image_size // factor} x {self.codec.image_size // factor} latents, "
                f"but {self._name} was trained on {size} x {size}; "
                f"set backbone.image_size={size * factor}"
            )
        channels, own = network.config.in_channels, self.codec.latent_channels
        if channels != own:
            raise UserError(
                f"{self._name} was trained on latents of {channels} channels, and "
                f"{f'backbone.vae={self.vae}' if self.vae else 'pixels (backbone.vae=null)'} has "
                f"{own}; give the backbone.vae that it was trained with"
            )
        return BareDiT(self.compute.place(network), self.compute), trained_on

    def _from_file(self, path: Path) -> tuple[DiTTransformer2DModel, list[str] | None]:
        """The network of one weight file and, where it says so, the wnids of its label rows."""
        tensors, metadata = read_weights("backbone.weights", path)
        config = metadata_json(metadata, "config", _Config, self._name)
        heads = self.num_heads if config is None else config.num_heads or self.num_heads
        network = from_original(tensors, heads, self._name)
        if config is None or config.num_heads is None:
            require_published_heads(tensors, self.num_heads, self._name)
        trained_on = metadata_json(metadata, "classes", list[str], self._name)
        rows = network.config.num_embeds_ada_norm
        if trained_on is not None and len(trained_on) != rows:
            raise UserError(
                f"{self._name}: its metadata names {len(trained_on)} classes, its network has "
                f"{rows}; fetch the file again"
            )
        return network, trained_on

    @property
    def _name(self) -> str:
        return f"backbone.weights={self._path or self._source}"

    @property
    def bare(self) -> BareDiT:
        """The transformer, float32, in eval mode; loaded on first use."""
        return self._loaded[0]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        return self.bare.latent_shape

    @property
    def schedule(self) -> NoiseSchedule:
        """DiT's linear schedule, both ends visited."""
        return self.bare.schedule

    @property
    def null_class(self) -> int:
        """The row after the last class."""
        return self.bare.null_class

    def refuse_classes(self, classes: Sequence[ClassInfo]) -> None:
        """`UserError` for a class that the weights cannot know, as far as their name tells."""
        if self._path is None:  # only a file of one's own may name other classes than ImageNet's
            require_imagenet(classes, self._name)

    def class_ids(self, classes: Sequence[ClassInfo]) -> list[int]:
        """ImageNet indices, or the position among the classes that the weights were trained on."""
        return label_rows(classes, self.null_class, self._loaded[1], self._name)

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """Noise and, where the network learned it, variance for x_t (B, C, h, w)."""
        return self.bare.predict(x_t, t, class_ids)

    @property
    def feature_blocks(self) -> int:
        """All transformer blocks."""
        return self.bare.feature_blocks

    def features(self, x_t: Tensor, t: Tensor, class_ids: Tensor, block: int) -> Tensor:
        """Block 1, 2 ...'s output, (B, tokens, D), for x_t (B, C, h, w)."""
        return self.bare.features(x_t, t, class_ids, block)

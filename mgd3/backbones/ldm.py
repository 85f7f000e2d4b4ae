"""Class-conditional latent diffusion (Rombach et al. 2022) on diffusers' modules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from mgd3.backbones.codecs import VAECodec
from mgd3.backbones.contract import Prediction
from mgd3.backbones.denoiser import Denoiser
from mgd3.backbones.inner_features import MidBlockFeatures
from mgd3.backbones.labels import label_rows
from mgd3.backbones.schedule import NoiseSchedule
from mgd3.backbones.weights.ldm_weights import LDMNetworks, load_ldm
from mgd3.backbones.weights.sources import find_file
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError, reading
from mgd3.storage.tensors import tensors_digest


class LDM(MidBlockFeatures):
    """CompVis's UNet and VQ first stage from an original `model.ckpt`, with its own schedule.

    A class is one token of cross-attention, its row of the embedding table. Latents are the first
    stage's before quantisation; decoding quantises them, as the original does.
    """

    def __init__(
        self,
        weights: str,
        image_size: int,
        num_heads: int = 1,
        cache: Path = Path("cache"),
        compute: Compute | None = None,
    ) -> None:
        """`weights`: a file or its https address; the converted tensors are kept in `cache`."""
        self.weights, self.image_size = str(weights), image_size
        self.num_heads = checks.integer("backbone.num_heads", num_heads, minimum=1)
        self.compute = compute or Compute()
        self.device, self.precision = self.compute.torch_device, self.compute.precision
        self._cache = Path(cache)
        path = find_file("backbone.weights", str(weights))
        if path is None:
            raise UserError(
                f"backbone.weights={weights} does not exist; allowed: CompVis's model.ckpt or its "
                "https address (python scripts/fetch_weights.py ldm_cin256)"
            )
        self._path = path
        self.codec = VAECodec(lambda: self._loaded.vq, image_size, compute=self.compute)

    @cached_property
    def _loaded(self) -> LDMNetworks:
        with reading(self._path, "fetch the file again, or give another backbone.weights"):
            return load_ldm(self._path, self.num_heads, self._cache)

    @cached_property
    def network(self) -> nn.Module:
        """The UNet, float32, in eval mode; loaded on first use."""
        return self.compute.place(self._loaded.unet)

    @cached_property
    def _denoiser(self) -> Denoiser:
        return Denoiser(self._conditioned, self.compute)

    @cached_property
    def _embeddings(self) -> Tensor:
        return self._loaded.classes.to(self.device)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        side = self.codec.image_size // self.codec.downsampling
        return self._loaded.unet.config.in_channels, side, side

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The checkpoint's own; steps as CompVis's `make_ddim_timesteps` spaces them: 1 ... 981."""
        abar = self._loaded.alphas_cumprod
        return NoiseSchedule(
            alphas_cumprod=abar, spacing="leading", offset=1, final_abar=abar[0].item()
        )

    @property
    def null_class(self) -> int:
        """The last row."""
        return len(self._loaded.classes) - 1

    def class_ids(self, classes: Sequence[ClassInfo]) -> list[int]:
        """ImageNet indices."""
        return label_rows(classes, self.null_class, None, f"backbone.weights={self._path}")

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """The noise in x_t (B, C, h, w)."""
        condition = self._condition(class_ids)
        return Prediction(eps=self._denoiser(self.compute.layout(x_t), t, *condition))

    def told_of(self, class_ids: Sequence[int]) -> str:
        """Identifies what the network is told of these rows: their embeddings."""
        return tensors_digest({"": self._loaded.classes[list(class_ids)]})

    def _condition(self, class_ids: Tensor) -> tuple[Tensor, ...]:
        return (self._embeddings[class_ids][:, None],)  # (B, 1, D)

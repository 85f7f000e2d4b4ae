"""Image codecs: pixels to the latents that a diffusion network sees, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mgd3.backbones.held_weights import HeldWeights
from mgd3.backbones.weights.sources import diffusers_source, load_pretrained
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute, to_device
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream


class VAECodec:
    """A first stage: AutoencoderKL, VQModel, or AutoencoderTiny for a fast preview.

    Latents are (B, C, H/f, W/f), scaled by the network's own factor (0.18215 for SD's): the
    posterior's mean (paper), or a sample from it, drawn from a stream of the image's own.
    """

    def __init__(
        self,
        load: Callable[[], Any],
        image_size: int,
        latents: str = "mean",
        output_size: int | None = None,
        compute: Compute | None = None,
    ) -> None:
        """`load` makes the network on first use; `output_size` None means `image_size`."""
        checks.choice("backbone.latents", latents, ["mean", "sample"])
        self.image_size = checks.integer("backbone.image_size", image_size, minimum=1)
        self.output_size = (
            image_size
            if output_size is None
            else checks.integer("backbone.output_size", output_size, minimum=1)
        )
        self.samples_latents = latents == "sample"
        self.compute = compute or Compute()
        self.encoding_precision = self.compute.encoding_precision
        self._load = load

    @cached_property
    def network(self) -> Any:
        """The first stage, float32, in eval mode; loaded on first use."""
        network = self._load()
        if network.config.get("latents_mean") is not None:
            raise UserError(
                f"the first stage {type(network).__name__} centres its latents by channel "
                "(latents_mean), which no backbone here was trained on; use another backbone.vae"
            )
        factor = _downsampling(network)
        if self.image_size % factor:
            down = self.image_size // factor * factor
            raise UserError(
                f"backbone.image_size={self.image_size} is not a multiple of {factor}, the factor "
                f"of {type(network).__name__}; the nearest are {down} and {down + factor}"
            )
        return self.compute.place(network)

    @property
    def latent_channels(self) -> int:
        """C of latents (B, C, h, w)."""
        return int(self.network.config.latent_channels)

    @cached_property
    def _decoding(self) -> HeldWeights[Any]:
        return HeldWeights(self.network, self.compute.autocast_type)

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along one side."""
        return _downsampling(self.network)

    @cached_property
    def id(self) -> str:
        """Digest of the weights that latents depend on, and what else moves them."""
        digest = hashlib.blake2s(str(self.network.config.scaling_factor).encode(), digest_size=8)
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        kind = type(self.network).__name__ + ("-sample" if self.samples_latents else "")
        precision = self.encoding_precision
        rounded = "" if precision == "float32" else f"-{precision}"
        return f"{kind}-{self.image_size}px-{digest.hexdigest()}{rounded}"

    @torch.no_grad()
    def encode(self, images: Tensor, keys: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, C, H/f, W/f)."""
        mean, std = self._posterior(images)
        if not self.samples_latents:
            return mean * self.network.config.scaling_factor
        if std is None:
            raise UserError(
                f"backbone.latents=sample: {type(self.network).__name__} has no posterior to draw "
                "from; use backbone.latents=mean"
            )
        shape = mean.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=stream("latent", key)) for key in keys])
        return (mean + std * to_device(noise, mean.device)) * self.network.config.scaling_factor

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the posterior, (B, C, H/f, W/f); 0 where it has none."""
        mean, std = self._posterior(images)
        factor = self.network.config.scaling_factor
        return mean * factor, torch.zeros_like(mean) if std is None else std * factor

    def _posterior(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Unscaled, float32; a first stage without a posterior gives its latents alone."""
        means, deviations = [], []
        with self.compute.encoding():
            for part in images.split(1 if self.compute.vae_slicing else len(images)):
                encoded = self.network.encode(self.compute.layout(part))
                posterior = getattr(encoded, "latent_dist", None)
                means.append(encoded.latents if posterior is None else posterior.mean)
                deviations += [] if posterior is None else [posterior.std]
        return torch.cat(means).float(), torch.cat(deviations).float() if deviations else None

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, fh, fw), about [-1, 1], not clamped.

        With a graph to the latents where the caller has autograd on.
        """
        scaled, network = latents / self.network.config.scaling_factor, self._decoding.current
        with self.compute.running():
            parts = [
                network.decode(self.compute.layout(part)).sample
                for part in scaled.split(1 if self.compute.vae_slicing else len(scaled))
            ]
        return torch.cat(parts).float()


def _downsampling(network: Any) -> int:
    """Every level but the last halves the sides."""
    config = network.config
    channels = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(channels) - 1)


class PixelCodec:
    """Greyscale pixels as latents: (B, 3, H, W) <-> (B, 1, H, W)."""

    downsampling = 1
    latent_channels = 1
    samples_latents = False

    def __init__(self, image_size: int, compute: Compute | None = None) -> None:
        """Raises `UserError` for an encoding precision: no network encodes."""
        if compute is not None and compute.encoding_precision != "float32":
            raise UserError(
                f"compute.encoding_precision={compute.encoding_precision}: this backbone's latents "
                "are pixels, which nothing encodes; leave it at float32"
            )
        self.image_size = checks.integer("backbone.image_size", image_size, minimum=1)
        self.output_size = self.image_size

    @property
    def id(self) -> str:
        """Pixels depend on the crop's size alone."""
        return f"grey-{self.image_size}px"

    def encode(self, images: Tensor, keys: Sequence[str]) -> Tensor:
        """The mean of the three channels, (B, 1, H, W)."""
        return images.mean(dim=1, keepdim=True)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pixels, without a spread."""
        mean = self.encode(images, ())
        return mean, torch.zeros_like(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """The grey value in each channel, (B, 3, H, W)."""
        return latents.expand(-1, 3, -1, -1)


def make_codec(
    vae: str | None,
    image_size: int,
    latents: str = "mean",
    compute: Compute | None = None,
    key: str = "vae",
) -> VAECodec | PixelCodec:
    """The latent space of a hub id's or a diffusers folder's VAE; pixel space where it is None.

    `key` is the backbone's that names it, for messages.
    """
    if vae is None:
        if latents != "mean":
            raise UserError(
                f"backbone.latents={latents}: without a backbone.vae latents are pixels"
            )
        return PixelCodec(image_size, compute)
    source = diffusers_source(f"backbone.{key}", vae)
    return VAECodec(
        lambda: load_pretrained(f"backbone.{key}", source, "vae"),
        image_size,
        latents=latents,
        compute=compute,
    )

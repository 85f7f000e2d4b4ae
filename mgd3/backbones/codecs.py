"""Image codecs: pixels to the latents that a diffusion network sees, and back."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mgd3 import checks
from mgd3.backbones.sources import diffusers_source, load_pretrained
from mgd3.types import Codec, UserError


class VAECodec:
    """Stable Diffusion's latent space: AutoencoderKL, or AutoencoderTiny for a fast preview.

    Latents are (B, 4, H/8, W/8): the posterior's mean (paper), scaled by the VAE's own factor
    (0.18215 for SD's). Weights come from a hub id or a local diffusers folder.
    """

    downsampling = 8

    def __init__(self, vae: str, image_size: int, device: torch.device) -> None:
        self.image_size = image_size
        self.source = diffusers_source("backbone.vae", vae)
        self.device = device

    @cached_property
    def network(self) -> Any:
        """The VAE, float32, in eval mode; loaded on first use."""
        return load_pretrained("backbone.vae", self.source, subfolder="vae").to(self.device).eval()

    @cached_property
    def id(self) -> str:
        """Digest of the weights that latents depend on."""
        digest = hashlib.blake2s(str(self.network.config.scaling_factor).encode(), digest_size=8)
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        return f"{type(self.network).__name__}-{self.image_size}px-{digest.hexdigest()}"

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to latents (B, 4, H/8, W/8)."""
        encoded = self.network.encode(images.to(self.device))
        is_tiny = hasattr(encoded, "latents")  # AutoencoderTiny has no posterior
        latents = encoded.latents if is_tiny else encoded.latent_dist.mean
        return latents * self.network.config.scaling_factor

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 4, h, w) to images (B, 3, 8h, 8w), about [-1, 1], not clamped."""
        return self.network.decode(latents / self.network.config.scaling_factor).sample


class PixelCodec:
    """Greyscale pixels as latents: (B, 3, H, W) <-> (B, 1, H, W)."""

    downsampling = 1

    def __init__(self, image_size: int, device: torch.device) -> None:
        self.image_size = image_size
        self.device = device

    @property
    def id(self) -> str:
        """Pixels depend on the crop's size alone."""
        return f"grey-{self.image_size}px"

    def encode(self, images: Tensor) -> Tensor:
        """The mean of the three channels, (B, 1, H, W)."""
        return images.mean(dim=1, keepdim=True)

    def decode(self, latents: Tensor) -> Tensor:
        """The grey value in each channel, (B, 3, H, W)."""
        return latents.expand(-1, 3, -1, -1)


def make_codec(vae: str | None, image_size: int, device: torch.device) -> Codec:
    """A VAE's latent space, or pixel space where `vae` is None."""
    checks.integer("backbone.image_size", image_size, minimum=1)
    return PixelCodec(image_size, device) if vae is None else VAECodec(vae, image_size, device)


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device={device} is not available here; allowed: auto, cpu, cuda"
        ) from error

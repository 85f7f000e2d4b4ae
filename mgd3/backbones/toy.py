"""A closed-form denoiser: pixels are Gaussian, so the best noise estimate is known."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mgd3.backbones.codecs import PixelCodec
from mgd3.backbones.contract import Prediction
from mgd3.backbones.schedule import NoiseSchedule, linear_alphas_cumprod
from mgd3.data.class_lists import ClassInfo
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute


class Toy:
    """Class k's latents are N(mean + k shift, std^2) in every element; «no class» is N(mean, 1).

    For data N(mu, s^2) and x_t = alpha x0 + sigma eps, E[eps | x_t] is
    sigma (x_t - alpha mu) / (alpha^2 s^2 + sigma^2). It predicts no variance.
    """

    null_class = 1000
    precision = "float32"

    def __init__(
        self,
        image_size: int,
        mean: float,
        shift: float,
        std: float,
        compute: Compute | None = None,
    ) -> None:
        self.image_size = image_size
        self.mean = checks.number("backbone.mean", mean)
        self.shift = checks.number("backbone.shift", shift)
        self.std = checks.number("backbone.std", std, minimum=0)
        self.device = (compute or Compute()).torch_device
        self.codec = PixelCodec(image_size, compute)
        self.latent_shape = (1, image_size, image_size)
        self.schedule = NoiseSchedule(alphas_cumprod=linear_alphas_cumprod())
        self._abar = self.schedule.alphas_cumprod.to(self.device)

    def class_ids(self, classes: Sequence[ClassInfo]) -> list[int]:
        """The label itself."""
        return list(range(len(classes)))

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """The optimal noise estimate for x_t (B, 1, h, w)."""
        abar = self._abar[t].to(x_t).view(-1, 1, 1, 1)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        is_null = (class_ids == self.null_class).view(-1, 1, 1, 1)
        mu = self.mean + self.shift * class_ids.view(-1, 1, 1, 1).to(x_t)
        mu = torch.where(is_null, torch.full_like(mu, self.mean), mu)
        s = torch.where(is_null, torch.ones_like(mu), torch.full_like(mu, self.std))
        return Prediction(eps=sigma * (x_t - alpha * mu) / (alpha**2 * s**2 + sigma**2))

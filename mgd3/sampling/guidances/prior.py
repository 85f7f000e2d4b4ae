"""DAP's guidance (ICLR 2026): steps towards the real images, as the denoiser itself sees them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from mgd3.backbones.contract import Backbone, FeatureBackbone
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.modes.latents import LatentCache
from mgd3.runtime import checks
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError
from mgd3.runtime.stages import Stage
from mgd3.sampling.guidances.real_features import RealFeatures
from mgd3.sampling.terms import DenoiseState, GuidanceTerm, SamplingBatch


class PriorGuidance:
    """Moves x_{t-1} by -gamma d/dx_t mean_n D(phi(x_t), phi(y_n,t)), y_n real images of the class.

    phi is a block of the denoiser at the same t, y_n,t is y_n with the noise of that t, and
    D^2 = K(x, x) + K(y, y) - 2 K(x, y): the Euclidean distance for the linear kernel. The shift is
    absolute, not times sigma. What the paper leaves open is an option; see guidance/prior.yaml.
    """

    needs_modes = False

    def __init__(
        self,
        scale: float,
        block: int | None,
        kernel: str = "linear",
        bandwidth: float | None = None,
        pooling: str = "none",
        feature_norm: str = "none",
        condition: str = "class",
        real_images: int | None = 64,
        noise: str = "image",
        gradient: str = "rms",
        low: int = 0,
        high: int | None = None,
    ) -> None:
        self.scale = checks.number("guidance.scale", scale, minimum=0)
        self.block = None if block is None else checks.integer("guidance.block", block, minimum=1)
        self.kernel = checks.choice("guidance.kernel", kernel, ["linear", "rbf"])
        self.bandwidth = (
            None
            if bandwidth is None
            else checks.number("guidance.bandwidth", bandwidth, minimum=1e-9)
        )
        self.pooling = checks.choice("guidance.pooling", pooling, ["none", "mean"])
        self.feature_norm = checks.choice("guidance.feature_norm", feature_norm, ["none", "unit"])
        self.condition = checks.choice("guidance.condition", condition, ["class", "no_class"])
        self.real_images = (
            None
            if real_images is None
            else checks.integer("guidance.real_images", real_images, minimum=1)
        )
        self.noise = checks.choice("guidance.noise", noise, ["image", "step"])
        self.gradient = checks.choice("guidance.gradient", gradient, ["raw", "rms"])
        self.low = checks.integer("guidance.low", low, minimum=0)
        self.high = (
            None if high is None else checks.integer("guidance.high", high, minimum=self.low)
        )
        self._real: RealFeatures | None = None

    def check(self, num_steps: int) -> None:
        """`low` and `high` count sampling steps down to 0, both included."""
        checks.integer("guidance.low", self.low, maximum=num_steps - 1)
        if self.high is not None:
            checks.integer("guidance.high", self.high, maximum=num_steps - 1)

    def fit(
        self,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        backbone: Backbone,
        work: Work,
    ) -> None:
        """Encode the real images that the cache lacks; their features come with the first step.

        Raises `UserError` for a backbone that shows no features or not this block, for float16,
        and for a class whose one image gives the kernel no width.
        """
        shown = self._showing(backbone)
        pairs = self._with_a_width(dataset, inventory)
        self._real = RealFeatures(shown, self._look, pairs, self.real_images, self.noise, work)
        self._real.encode()

    def stages(
        self,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        backbone: Backbone,
        work: Work,
    ) -> list[Stage]:
        """Encoding the real images; refuses what `fit` does, but for a block beyond the last."""
        self._able(backbone)
        pairs = self._with_a_width(dataset, inventory)
        return [LatentCache(work.cache / "latents", backbone.codec, work.flip).stage(pairs)]

    def _with_a_width(
        self, dataset: RealDataset, inventory: Sequence[ClassImages]
    ) -> list[tuple[ClassInfo, ClassImages]]:
        """Classes and their images, of which each gives the kernel a width."""
        pairs = list(zip(dataset.classes, inventory, strict=True))
        if self.kernel == "rbf" and self.bandwidth is None:
            for info, images in pairs:
                if min(len(images.images), self.real_images or 2) < 2:
                    raise UserError(
                        f"guidance.kernel=rbf takes its width from a class's real images, and of "
                        f"{info.wnid} it sees one; set guidance.bandwidth"
                    )
        return pairs

    def _showing(self, backbone: Backbone) -> FeatureBackbone:
        """The backbone, if it shows what is asked for; loads its network."""
        shown = self._able(backbone)
        checks.integer("guidance.block", self.block, minimum=1, maximum=shown.feature_blocks)
        return shown

    def _able(self, backbone: Backbone) -> FeatureBackbone:
        """The backbone, unless it is plain without its network that it cannot be."""
        kind = type(self).__name__
        if not hasattr(backbone, "features"):
            raise UserError(
                f"guidance: {kind} reads features of the denoiser's blocks, which "
                f"{type(backbone).__name__} does not show; use a DiT, an LDM or Stable Diffusion"
            )
        if self.block is None:
            raise UserError("guidance.block is not set; give the block whose features are compared")
        if backbone.precision == "float16":
            raise UserError(
                f"guidance: {kind} needs gradients of the denoiser, which underflow in "
                "compute.precision=float16; use bfloat16 or float32"
            )
        return cast(FeatureBackbone, backbone)

    def bind(self, batch: SamplingBatch) -> GuidanceTerm:
        """The term of one batch."""
        real = self._real
        assert real is not None, "fit first"
        real.begin([wnid for wnid, _ in batch.images])
        rows = batch.class_ids.tolist()  # once a batch: it waits for the device

        def term(state: DenoiseState) -> Tensor:
            high = state.num_steps if self.high is None else self.high
            if not self.low <= state.step <= high:
                return torch.zeros_like(state.x0_hat)
            return state.from_shift(self._shift(real, rows, batch, state))

        return term

    def _shift(
        self, real: RealFeatures, rows: Sequence[int], batch: SamplingBatch, state: DenoiseState
    ) -> Tensor:
        """-gamma times each row's own gradient, (B, C, h, w)."""
        ids, alike = batch.class_ids, defaultdict(list)  # rows that are compared with the same
        for place, ((wnid, _), row) in enumerate(zip(batch.images, rows, strict=True)):
            alike[wnid, row].append(place)
        with torch.enable_grad():
            x_t = state.x_t.detach().requires_grad_()
            seen = self._look(real.backbone, x_t, state.t, ids)  # (B, M)
            slopes = torch.empty_like(seen)
            for (wnid, row), places in alike.items():
                own = real.at(wnid, row, ids[places[0]], state)  # (n, M)
                # to the features first, row by row: only that graph grows with the real images
                for place in places:
                    slopes[place] = self._slope(seen[place].detach(), own)
            (found,) = torch.autograd.grad(seen, x_t, grad_outputs=slopes)
        if self.gradient == "rms":
            sizes = found.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            found = found / sizes.clamp(min=1e-12)
        return -self.scale * found

    def _look(self, backbone: FeatureBackbone, x_t: Tensor, t: int, class_ids: Tensor) -> Tensor:
        """phi of x_t (B, C, h, w), as long vectors (B, M)."""
        assert self.block is not None
        if self.condition == "no_class":
            class_ids = torch.full_like(class_ids, backbone.null_class)
        seen = backbone.features(x_t, torch.full_like(class_ids, t), class_ids, self.block)
        if self.pooling == "mean":
            seen = seen.mean(dim=1, keepdim=True)
        if self.feature_norm == "unit":
            seen = F.normalize(seen, dim=2, eps=1e-12)
        return seen.flatten(1)

    def _slope(self, seen: Tensor, real: Tensor) -> Tensor:
        """Gradient (M,) of one row's mean distance in its features (M,), to real ones (n, M)."""
        seen = seen.requires_grad_()
        (slope,) = torch.autograd.grad(self.distance(seen, real).mean(), seen)
        return slope

    def distance(self, seen: Tensor, real: Tensor) -> Tensor:
        """D of features (M,) and real ones (n, M): (n,).

        The rbf kernel is exp(-|x - y|^2 / (2 w^2)), w the real features' spread unless given.
        """
        square = (real - seen).square().sum(dim=1)
        if self.kernel == "rbf":
            width = self.bandwidth or _spread(real)
            square = -2 * torch.expm1(-square / (2 * width**2))
        return (square + 1e-12).sqrt()  # whose slope at 0 is 0


def _spread(features: Tensor) -> float:
    """Root mean square distance of features (n, M) to their mean."""
    apart = features - features.mean(dim=0)
    return max(apart.square().sum(dim=1).mean().sqrt().item(), 1e-6)

"""Features of real images on their way to noise, as the denoiser sees them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from mgd3.backbones.contract import FeatureBackbone
from mgd3.data.class_lists import ClassInfo
from mgd3.data.inventory import ClassImages
from mgd3.modes.latents import LatentCache
from mgd3.runtime.compute import Work
from mgd3.runtime.seeding import stream
from mgd3.sampling.terms import DenoiseState

# backbone, x_t (B, C, h, w), t, class ids (B,) to features (B, M)
Look = Callable[[FeatureBackbone, Tensor, int, Tensor], Tensor]
_CHUNK = 16  # fixed, because a network rounds differently in another batch
_ROOM = 2**30  # bytes of features that are kept


class RealFeatures:
    """Of the same real images of a class for all its images and all batches.

    An image's noise is its own, from its name alone: «image» draws it once for all steps, «step»
    anew for each. Features are made when a step first asks for them, under the weights that are
    in force then, and kept in memory while there is room; what is kept changes no value.
    """

    def __init__(
        self,
        backbone: FeatureBackbone,
        look: Look,
        classes: Sequence[tuple[ClassInfo, ClassImages]],
        count: int | None,
        noise: str,
        work: Work,
    ) -> None:
        """Of each class `count` images are seen, all where there are fewer or it is None."""
        self.backbone = backbone
        self._look, self._count, self._noise = look, count, noise
        self._classes = {info.wnid: (info, images) for info, images in classes}
        self._cache = LatentCache(work.cache / "latents", backbone.codec, work.flip)
        self._latents: dict[str, tuple[Tensor, list[str]]] = {}  # (n, C, h, w), keys; by wnid
        self._kept: dict[tuple[str, int, int], Tensor] = {}  # (n, M) by wnid, row and t
        self._full = False

    def encode(self) -> None:
        """Encode what the cache lacks."""
        with self._cache.encoding(list(self._classes.values())):
            for info, images in self._classes.values():
                self._cache.latents(info, images)

    def begin(self, wnids: Collection[str]) -> None:
        """A batch of these classes comes; others make room for them if that is needed."""
        if self._full:
            self._kept = {key: kept for key, kept in self._kept.items() if key[0] in wnids}
            self._full = False
        self._latents = {wnid: own for wnid, own in self._latents.items() if wnid in wnids}

    def at(self, wnid: str, row: int, class_id: Tensor, state: DenoiseState) -> Tensor:
        """Features (n, M) of a class's real images, noised as x_t of this step is.

        `row` is the number in `class_id`, what the backbone is told: an image's own prompt, it may
        be.
        """
        key = wnid, row, state.t
        if key not in self._kept:
            made = self._make(wnid, class_id, state)
            held = sum(kept.numel() * kept.element_size() for kept in self._kept.values())
            self._full |= held + made.numel() * made.element_size() > _ROOM
            if self._full:
                return made
            self._kept[key] = made
        return self._kept[key]

    @torch.no_grad()
    def _make(self, wnid: str, class_id: Tensor, state: DenoiseState) -> Tensor:
        latents, keys = self._chosen(wnid)
        own = [] if self._noise == "image" else [state.t]
        noise = torch.stack(
            [
                torch.randn(latents.shape[1:], generator=stream("real features", key, *own))
                for key in keys
            ]
        )
        noisy = (state.abar**0.5 * latents + (1 - state.abar) ** 0.5 * noise).to(state.x_t)
        return torch.cat(
            [
                self._look(self.backbone, part, state.t, class_id.expand(len(part)))
                for part in noisy.split(_CHUNK)
            ]
        )

    def _chosen(self, wnid: str) -> tuple[Tensor, list[str]]:
        """Latents (n, C, h, w) and keys of the real images: a fixed draw, alike for every seed."""
        if wnid not in self._latents:
            info, images = self._classes[wnid]
            draw = stream("real features", wnid)
            rows = torch.randperm(len(images.images), generator=draw)[: self._count].tolist()
            latents = self._cache.latents(info, images)[rows]
            self._latents[wnid] = latents, [images.images[row].key for row in rows]
        return self._latents[wnid]

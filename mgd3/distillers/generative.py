"""Distillation by generation: real latents, modes, guided samples, images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd3.datasets import RealDataset
from mgd3.discovery import ClassModes, Work, discover_modes
from mgd3.distilled import DistilledDataset, DistilledWriter
from mgd3.pixels import center_crop, from_pil, to_pixels
from mgd3.previews import MOST_CLASSES, MOST_MODES, Preview, load_previews, save_previews
from mgd3.progress import progress
from mgd3.seeding import ImageNoise
from mgd3.timing import StageTimes
from mgd3.types import Backbone, Codec, Guidance, ModeFinder, Sampler, UserError

_DECODE_BATCH = 16


class GenerativeDistiller:
    """One generated image per mode (MGD3), or per noise stream where nothing guides.

    Images of all classes are sampled together, `batch_size` at a time. A batch is written once it
    is decoded; a batch with a missing image is sampled again whole, so that a resumed run does
    the same matrix products, and writes the same bytes, as one that was never stopped.
    """

    def __init__(
        self,
        backbone: Backbone,
        sampler: Sampler,
        guidance: Guidance,
        modes: ModeFinder,
        work: Work,
    ) -> None:
        self.backbone = backbone
        self.sampler = sampler
        self.guidance = guidance
        self.mode_finder = modes
        self.work = work

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Write `ipc` images per class below `out`."""
        class_ids = self.backbone.class_ids(dataset.classes)  # loads the weights, or says why not
        found: dict[str, ClassModes] = {}
        if self.guidance.needs_modes:
            found = discover_modes(
                dataset, self.backbone.codec, self.mode_finder, ipc, self.work, out
            )
            if not load_previews(out):
                save_previews(out, _previews(found, self.backbone.codec))
        writer = DistilledWriter(out, dataset, ipc, seed)
        with StageTimes(out / "times.json").stage("sample"):
            self._fill(writer, dataset, ipc, seed, class_ids, found)
        nearest = {w: [i.key for i in modes.nearest] for w, modes in found.items()}
        writer.finish(provenance, nearest, generated=True)
        return DistilledDataset(out)

    def _fill(
        self,
        writer: DistilledWriter,
        dataset: RealDataset,
        ipc: int,
        seed: int,
        class_ids: list[int],
        found: Mapping[str, ClassModes],
    ) -> None:
        wanted = [(label, k) for label in range(len(dataset.classes)) for k in range(ipc)]
        size, steps = self.work.batch_size, self.sampler.steps
        with progress(f"sampling {len(wanted)} images, steps", len(wanted) * steps) as advance:
            for start in range(0, len(wanted), size):
                batch = wanted[start : start + size]
                keys = [(dataset.classes[label].wnid, k) for label, k in batch]
                if all(writer.has(wnid, k) for wnid, k in keys):
                    advance(len(batch) * steps)
                    continue
                ids = torch.tensor([class_ids[label] for label, _ in batch])
                latents = self._sample(keys, ids, found, seed, lambda: advance(len(keys)))  # noqa: B023
                for (wnid, k), image in zip(keys, self._decode(keys, latents), strict=True):
                    writer.write(wnid, k, to_pixels(image))

    def _sample(
        self,
        keys: list[tuple[str, int]],
        class_ids: Tensor,
        found: Mapping[str, ClassModes],
        seed: int,
        on_step: Callable[[], None],
    ) -> Tensor:
        shape, device = self.backbone.latent_shape, self.backbone.device
        modes = (
            torch.stack([found[wnid].modes.centers[k] for wnid, k in keys])
            if found
            else torch.zeros(len(keys), *shape)
        )  # (B, C, h, w)
        latents = self.sampler(
            self.backbone,
            class_ids=class_ids.to(device),
            guidance=self.guidance,
            modes=modes.to(device),
            noise=ImageNoise(seed, keys, shape),
            on_step=on_step,
        )
        _require_finite(keys, latents)
        return latents

    def _decode(self, keys: list[tuple[str, int]], latents: Tensor) -> Tensor:
        """Images (B, 3, H, W); a few at a time, because a VAE needs far more memory than a step."""
        parts = [self.backbone.codec.decode(part) for part in latents.split(_DECODE_BATCH)]
        images = torch.cat(parts)
        _require_finite(keys, images)
        return images.cpu()


def _require_finite(keys: list[tuple[str, int]], rows: Tensor) -> None:
    bad = ~rows.flatten(1).isfinite().all(dim=1)  # (B,)
    if bad.any():
        wnid, k = keys[int(bad.nonzero()[0])]
        raise UserError(
            f"the sample of class {wnid}, image {k} is not finite: the backbone's weights are "
            "bad, or guidance.scale or sampler.cfg_scale is far too large; nothing was written"
        )


def _previews(found: Mapping[str, ClassModes], codec: Codec) -> dict[str, Preview]:
    """Decoded centroids and nearest real images of the first modes of the first classes."""
    previews = {}
    for wnid, modes in list(found.items())[:MOST_CLASSES]:
        centers = modes.modes.centers[:MOST_MODES].to(codec.device)
        nearest = [center_crop(i.decode(), codec.image_size) for i in modes.nearest[:MOST_MODES]]
        previews[wnid] = (
            to_pixels(codec.decode(centers)).cpu(),
            torch.stack([from_pil(image) for image in nearest]),
        )
    return previews

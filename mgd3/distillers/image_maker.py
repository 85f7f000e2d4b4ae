"""Images from latents and noise: sampling, refining and decoding of any images of a set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone, compiles
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.distillers.finished import FinishedLatents, ImageKey
from mgd3.distillers.parts import Sampler
from mgd3.distillers.pixel_decoder import PixelDecoder
from mgd3.distillers.refining import NoRefinement, Refine
from mgd3.modes.discovery import ClassModes
from mgd3.runtime.batching import largest_batch
from mgd3.runtime.compute import Work, as_written, to_device
from mgd3.runtime.errors import UserError
from mgd3.runtime.stages import Stage, stages_of
from mgd3.sampling.combination import Sum
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.starts import Start
from mgd3.sampling.terms import (
    DenoiseState,
    Guidance,
    Reach,
    SamplingBatch,
    Target,
    fit_part,
    has_twin,
    needs_finished,
    reach_of,
)

REFINE_BATCH = 16  # images at once: their graphs need far more memory than a step


@dataclass(frozen=True, kw_only=True)
class Making:
    """What all images of one set share while they are made."""

    seed: int
    rows: Mapping[str, int]  # the backbone's rows of the classes, by wnid
    labels: Mapping[str, int]  # positions in the dataset by wnid
    found: Mapping[str, ClassModes]  # empty where nothing needs modes
    finished: FinishedLatents | None = None  # where something reads them
    own_rows: Mapping[str, Sequence[int]] = field(default_factory=dict)  # of each mode's prompt

    def row(self, key: ImageKey) -> int:
        """The backbone's row of an image: its mode's where modes have prompts, else its class's."""
        wnid, k = key
        own = self.own_rows.get(wnid)
        return self.rows[wnid] if own is None else own[k % len(own)]


class ImageMaker:
    """Samples, refines and decodes; knows nothing of files or of which images are wanted."""

    def __init__(
        self, backbone: Backbone, sampler: Sampler, guidance: Guidance, start: Start, refine: Refine
    ) -> None:
        self.backbone, self.sampler, self.guidance = backbone, sampler, guidance
        self.start, self.refine = start, refine
        self.decode = PixelDecoder(backbone.codec)

    @property
    def needs_modes(self) -> bool:
        """Do guidance or start?"""
        return self.guidance.needs_modes or self.start.needs_modes

    @property
    def learns(self) -> bool:
        """Does guidance or start learn from the real images before any is made?"""
        return any(hasattr(part, "fit") for part in (self.guidance, self.start))

    @property
    def refines(self) -> bool:
        """Is anything done to finished latents?"""
        return not isinstance(self.refine, NoRefinement)

    @property
    def in_order(self) -> bool:
        """Does an image depend on earlier ones of its class?"""
        return needs_finished(self.guidance)

    @property
    def block(self) -> int:
        """How many images of a class may be made at once where they depend on earlier ones."""
        return getattr(self.guidance, "block", 1)

    def refuse_gradients(self) -> None:
        """`UserError` where a gradient is asked for that cannot be had."""
        for key, part in (("guidance", self.guidance), ("refine", self.refine)):
            reach = reach_of(part)
            if reach and self.backbone.precision == "float16":
                raise UserError(
                    f"{key}: {type(part).__name__} needs gradients, which underflow in "
                    "compute.precision=float16; use bfloat16 or float32"
                )
            if reach is Reach.DENOISER and compiles(self.backbone):
                raise UserError(
                    f"{key}: {type(part).__name__} needs gradients of the denoiser, which a "
                    "compiled one is not made for; set compute.compile=training, which "
                    "compiles all but the denoiser, or false"
                )

    def fit(self, dataset: RealDataset, work: Work) -> None:
        """Let guidance and start learn from the real training images, once before any image."""
        inventory = partial(take_inventory, dataset, "train", 1, work.cache, work.workers)
        for part in (self.guidance, self.start):
            fit_part(part, dataset, inventory, self.backbone, work)

    def stages(
        self, dataset: RealDataset, inventory: Sequence[ClassImages], work: Work
    ) -> list[Stage]:
        """What `fit` would do."""
        what = dataset, inventory, self.backbone, work
        return [*stages_of(self.guidance, *what), *stages_of(self.start, *what)]

    @property
    def kind(self) -> str:
        """What the time of a step depends on beside the backbone: guidance and refinement."""
        parts = self.guidance.parts.values() if isinstance(self.guidance, Sum) else [self.guidance]
        names = [type(p).__name__ + (" with twins" if has_twin(p) else "") for p in parts]
        return " + ".join([*names, type(self.refine).__name__] if self.refines else names)

    def largest_batch(self, class_id: int) -> int:
        """How many images at once free memory takes, gradients included."""
        backbone = self.backbone

        def one_step(images: int) -> None:
            """A guided step needs a pair of rows for each image."""
            ids = torch.full((2 * images,), class_id, device=backbone.device)
            x_t = torch.zeros(2 * images, *backbone.latent_shape, device=backbone.device)
            differentiates = reach_of(self.guidance)
            with torch.set_grad_enabled(bool(differentiates)), as_written():
                x_t.requires_grad_(bool(differentiates))
                eps = backbone.predict(x_t, torch.zeros_like(ids), ids).eps
                if differentiates:  # a term may look at the image
                    seen = backbone.codec.decode((x_t - eps)[:images])
                    torch.autograd.grad(seen.sum(), x_t)

        return largest_batch(one_step, backbone.device)

    def sample(
        self,
        keys: Sequence[ImageKey],
        making: Making,
        on_step: Callable[[DenoiseState], None] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of some images.

        `on_step` sees every step.
        """
        batch, noise = self._batch(keys, making), self._noise(keys, making)
        return self.sampler(self.backbone, batch, self.guidance, noise, self.start, on_step)

    def refined(self, keys: Sequence[ImageKey], latents: Tensor, making: Making) -> Tensor:
        """Finished latents (B, C, h, w) after `refine`."""
        if isinstance(self.refine, NoRefinement):
            return latents
        noise = self._noise(keys, making, "refine")
        batch = self._batch(keys, making)
        return self.refine(self.backbone, latents.to(self.backbone.device), batch, noise)

    def _noise(self, keys: Sequence[ImageKey], making: Making, purpose: str = "") -> ImageNoise:
        backbone, steps = self.backbone, self.start.steps(self.sampler.steps)
        return ImageNoise(
            making.seed, keys, backbone.latent_shape, backbone.device, steps - 1, purpose
        )

    def _batch(self, keys: Sequence[ImageKey], making: Making) -> SamplingBatch:
        """What guidance, start and refinement are told of these images."""
        shape, device, finished = self.backbone.latent_shape, self.backbone.device, making.finished
        found = making.found
        targets = [_target(found[wnid], k) for wnid, k in keys] if found else []
        modes = (
            torch.stack([t.modes.centers[t.index] for t in targets])
            if targets
            else torch.zeros(len(keys), *shape, device=device)
        )  # (B, C, h, w)
        class_ids = torch.tensor([making.row(key) for key in keys])
        modes, class_ids = to_device((modes, class_ids), device)

        def before(row: int) -> Tensor:
            assert finished is not None
            read = finished.read_by(keys[row])
            return finished.of(read).to(device) if read else torch.zeros(0, *shape, device=device)

        return SamplingBatch(
            class_ids=class_ids,
            modes=modes,
            targets=targets,
            images=keys,
            labels=[making.labels[wnid] for wnid, _ in keys],
            seed=making.seed,
            finished=None if finished is None else before,
        )

    def pixels(self, keys: Sequence[ImageKey], latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 on the CPU; `UserError` if one or its latent is not finite."""
        return self.decode(latents).pixels(keys)


def _target(modes: ClassModes, image: int) -> Target:
    """What the class's image (or candidate) number `image` is steered to."""
    index = image % len(modes.modes.centers)
    return Target(modes=modes.modes, index=index, latents=modes.latents)

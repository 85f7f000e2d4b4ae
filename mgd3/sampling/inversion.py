"""Real latents taken to noise by DDIM, and the Gaussian that a class's are there (D3HR)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone, compiles, told_of
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.modes.latents import LatentCache
from mgd3.runtime.batching import Batches
from mgd3.runtime.compute import Work
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import progress
from mgd3.runtime.stages import Stage, announce
from mgd3.sampling.samplers import classifier_free
from mgd3.storage.cache import cached, found
from mgd3.storage.tensors import tensors_digest
from mgd3.storage.timing import WorkPace

_CHUNK = 32  # fixed, because a network rounds differently in another batch
_PLACES = ("weights", "vae")  # of a backbone: what its files hold counts, not where they lie


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """DDIM backwards, from a latent to sampling step `level` of `steps`.

    eps is predicted at (x, t) of the noisier end, with the classifier-free guidance of sampling.
    """

    steps: int
    level: int
    cfg_scale: float
    cfg_channels: int

    @torch.no_grad()
    def __call__(self, backbone: Backbone, latents: Tensor, class_ids: Tensor) -> Tensor:
        """Latents (B, C, h, w) of these rows (B,) at the noise of step `level`, (B, C, h, w)."""
        schedule = backbone.schedule.respaced(self.steps)
        x, before = latents, schedule.final_abar
        for step in range(self.level + 1):
            t = torch.full_like(class_ids, schedule.timesteps[step])
            eps = classifier_free(backbone, x, t, class_ids, self.cfg_scale, self.cfg_channels).eps
            abar = schedule.abar[step].item()
            x0 = (x - (1 - before) ** 0.5 * eps) / before**0.5
            x, before = abar**0.5 * x0 + (1 - abar) ** 0.5 * eps, abar
        return x


@dataclass(frozen=True)
class ClassGaussian:
    """A class's inverted latents, dimension by dimension."""

    mean: Tensor  # (C, h, w)
    std: Tensor  # (C, h, w), of the unbiased variance
    key: str  # of all that they were made from


class InvertedClasses:
    """The Gaussian of each class: two tensors a class, once per cache."""

    def __init__(self, inversion: Inversion, backbone: Backbone, work: Work) -> None:
        self._inversion, self._backbone = inversion, backbone
        self._latents = LatentCache(work.cache / "latents", backbone.codec, work.flip)
        self._folder = work.cache / "inversions"
        self._batches = Batches(_CHUNK, "inverting")
        settings = {**asdict(inversion), "precision": backbone.precision}
        self._denoiser = f"{denoiser_digest(backbone)} {json.dumps(settings)}"
        self._rows: dict[str, int] = {}  # of classes, by wnid
        name = Path(str(getattr(backbone, "weights", type(backbone).__name__))).name
        kind = f"{inversion.level + 1} steps by {name}, cfg {inversion.cfg_scale}"
        compiled = ", compiled" if compiles(backbone) else ""
        kind = f"inverting in {kind}, {backbone.precision}{compiled}"
        self._pace = WorkPace(work.cache, kind, backbone.device)

    def fit(
        self, dataset: RealDataset, inventory: Sequence[ClassImages]
    ) -> dict[str, ClassGaussian]:
        """By wnid; those that the cache lacks are made now, class by class.

        Raises `UserError` for a class of one image, which has no variance.
        """
        self._ask(dataset)
        rows = [self._rows[info.wnid] for info in dataset.classes]
        classes = list(zip(dataset.classes, inventory, rows, strict=True))
        for info, images, _ in classes:
            if len(images.images) < 2:
                raise UserError(
                    f"start: class {info.wnid} ({info.name}) has {len(images.images)} usable train "
                    "image; the variance of its inverted latents needs 2 or more: add images"
                )
        missing = [c for c in classes if self._lacks(*c[:2])]
        with self._latents.encoding([c[:2] for c in missing]):
            for info, images, _ in missing:
                self._latents.latents(info, images)
        count = sum(len(images.images) for _, images, _ in missing)
        stage = self._stage(count)
        announce(stage)
        what, unit, first_compiles = "inverting", "real images", compiles(self._backbone)
        with progress(what, count, unit, 0, stage, self._pace, first_compiles) as advance:
            return {
                info.wnid: self._of(info, images, row, advance) for info, images, row in classes
            }

    def stages(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> list[Stage]:
        """Encoding and inverting of the classes that the cache lacks."""
        self._ask(dataset)
        pairs = zip(dataset.classes, inventory, strict=True)
        missing = [pair for pair in pairs if self._lacks(*pair)]
        count = sum(len(images.images) for _, images in missing)
        return [self._latents.stage(missing), self._stage(count)]

    def _ask(self, dataset: RealDataset) -> None:
        rows = self._backbone.class_ids(dataset.classes)
        self._rows = {c.wnid: row for c, row in zip(dataset.classes, rows, strict=True)}

    def _lacks(self, info: ClassInfo, images: ClassImages) -> bool:
        return found(*self._file(info, images)) is None

    def _stage(self, images: int) -> Stage:
        each, steps = self._pace.seconds, self._inversion.level + 1
        return Stage(
            what=f"inverts {images:,} real latents in {steps} steps each",
            seconds=None if each is None else images * each,
            shorter="sampler.steps=…",
            there=images == 0,
        )

    def _file(self, info: ClassInfo, images: ClassImages) -> tuple[Path, dict[str, str]]:
        """Where a class's lies, and what it is made from."""
        rows = self._rows[info.wnid], self._backbone.null_class
        key = {
            "latents": self._latents.key(info, images),
            "denoiser": self._denoiser,
            "told": told_of(self._backbone, rows),
        }
        digest = hashlib.blake2s(json.dumps(key).encode(), digest_size=8).hexdigest()
        return self._folder / f"{info.wnid}-{digest}.safetensors", key

    def _of(
        self, info: ClassInfo, images: ClassImages, row: int, advance: Callable[..., None]
    ) -> ClassGaussian:
        path, key = self._file(info, images)

        def make() -> dict[str, Tensor]:
            latents = self._latents.latents(info, images)
            x = torch.cat([part for part in self._inverted(latents, row, advance)]).double()
            if not x.isfinite().all():
                raise UserError(
                    f"start: an inverted latent of class {info.wnid} is not finite: the precision "
                    "overflows, the backbone's weights are bad, or sampler.cfg_scale is too large"
                )
            return {"mean": x.mean(dim=0).float(), "std": x.std(dim=0).float()}

        held: dict[str, Tensor] = cached(path, key, make)
        return ClassGaussian(held["mean"], held["std"], path.stem)

    def _inverted(self, latents: Tensor, row: int, advance: Callable[..., None]) -> list[Tensor]:
        device, done = self._backbone.device, []
        for attempt in self._batches.attempts(latents):
            with attempt as part:
                ids = torch.full((len(part),), row, device=device)
                moved = self._inversion(self._backbone, part.to(device), ids).cpu()
            if attempt.error is None:
                done.append(moved)
                advance(len(attempt.part))
        return done


def denoiser_digest(backbone: Backbone) -> str:
    """Identifies what a backbone predicts: its network's weights, its schedule, its settings.

    What the network is told of a class is not in it.
    """
    settings = {
        name: value
        for name, value in vars(backbone).items()
        if isinstance(value, str | int | float) and name.lstrip("_") not in _PLACES
    }
    network = getattr(getattr(backbone, "bare", backbone), "network", None)
    weights = tensors_digest(network.state_dict()) if network is not None else ""
    schedule = backbone.schedule
    noise = asdict(schedule) | {"abar": tensors_digest({"": schedule.alphas_cumprod})}
    noise.pop("alphas_cumprod")
    settings |= noise | {"prediction": getattr(backbone, "prediction_type", "epsilon")}
    kind = type(backbone)
    return f"{kind.__module__}.{kind.__qualname__} {json.dumps(settings, sort_keys=True)} {weights}"

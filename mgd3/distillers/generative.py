"""Distillation by generation: real latents, modes, guided samples, images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone
from mgd3.data.background_writer import BackgroundWriter
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset, DistilledWriter
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.data.pixels import center_crop, from_pil
from mgd3.data.previews import MOST_CLASSES, MOST_MODES, Preview, load_previews, save_previews
from mgd3.distillers.parts import FineTune, Sampler, Selection
from mgd3.distillers.pixel_decoder import PixelDecoder
from mgd3.distillers.pool import FirstCandidates, checked
from mgd3.finetuning.phases import NoFineTuning
from mgd3.modes.discovery import ClassModes, discover_modes, mode_stages
from mgd3.modes.finders import ModeFinder
from mgd3.runtime import checks
from mgd3.runtime.batching import Batches, largest_batch
from mgd3.runtime.compute import Work, as_written, to_device
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import progress, track
from mgd3.runtime.stages import Stage, announce
from mgd3.sampling.guidance import ModeGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.starts import NoiseStart, Start
from mgd3.sampling.terms import DenoiseState, Guidance, SamplingBatch, Target
from mgd3.storage.timing import StageTimes, WorkPace

log = logging.getLogger(__name__)

ImageKey = tuple[str, int]  # wnid and noise stream
CANDIDATES = ".pool"  # hidden, or readers of the set's folder take candidates for its images


class GenerativeDistiller:
    """One generated image per mode (MGD3), or per noise stream where nothing guides.

    Images of all classes are sampled together, `batch_size` at a time. A batch with a missing image
    is sampled again whole, so that a resumed run of the same batch size does the same matrix
    products, and writes the same bytes, as one that was never stopped. Where memory runs out,
    batches are halved and nothing that is written is lost; pixels then agree up to rounding.

    Several processes (`ranks`) take turns at the batches, and write the same bytes as one.

    With `pool` m > 1, m candidates per image are made in `out`/.pool, each from a noise stream of
    its own, and `select` says which one is kept.
    """

    def __init__(
        self,
        backbone: Backbone,
        sampler: Sampler,
        guidance: Guidance,
        modes: ModeFinder,
        work: Work,
        start: Start | None = None,
        finetune: FineTune | None = None,
        select: Selection | None = None,
        pool: int = 1,
        ranks: Ranks | None = None,
        on_step: Callable[[DenoiseState], None] | None = None,
    ) -> None:
        """`start` None begins in pure noise, `finetune` None takes the backbone as it is.

        `on_step` sees every step of every batch.

        Raises `UserError` for a selection without candidates.
        """
        self.backbone = backbone
        self.sampler = sampler
        self.guidance = guidance
        self.mode_finder = modes
        self.work = work
        self.start = start or NoiseStart()
        self.finetune = finetune or NoFineTuning()
        self.select = select or FirstCandidates()
        self.ranks = ranks or Ranks()
        self.on_step = on_step
        self.pool = checks.integer("pool", pool, minimum=1)
        if pool == 1 and not isinstance(self.select, FirstCandidates):
            raise UserError("pool=1 leaves nothing to select; set pool=2 or more, or select=first")
        self._decode = PixelDecoder(backbone.codec)

    def least_real(self, ipc: int) -> int:
        """Each mode is the centre of one real image at least; selection has its own need."""
        needs_modes = self.guidance.needs_modes or self.start.needs_modes
        return ipc if needs_modes or self.pool > 1 else 0

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Write `ipc` images per class below `out`; all processes call this at once."""
        ranks = self.ranks
        class_ids = self.backbone.class_ids(dataset.classes)  # loads the weights, or says why not
        if ranks.first and isinstance(self.guidance, ModeGuidance) and not self._guided_steps:
            log.warning(
                "guidance.scale=%g with guidance.stop_t=%d guides none of the %d steps (%d to 0; "
                "those above stop_t are guided): the images are those of guidance=none",
                *(self.guidance.scale, self.guidance.stop_t, self._steps, self._steps - 1),
            )
        found: dict[str, ClassModes] = {}
        if self.guidance.needs_modes or self.start.needs_modes:
            found = discover_modes(
                dataset, self.backbone.codec, self.mode_finder, ipc, self.work, out, ranks
            )
            if ranks.first and not load_previews(out):
                save_previews(out, self._previews(found))
        times = StageTimes(out / "times.json", keep=ranks.first)
        with times.stage("finetune"):
            phases = ranks.in_turn(lambda: self.finetune(self.backbone, dataset, self.work))
        writer = DistilledWriter(out, dataset, ipc, seed)
        candidates = writer
        if self.pool > 1:
            if isinstance(self.select, FirstCandidates):
                log.warning("pool=%d: select=first leaves all but the first unused", self.pool)
            candidates = DistilledWriter(out / CANDIDATES, dataset, ipc * self.pool, seed)
        rows = {info.wnid: row for info, row in zip(dataset.classes, class_ids, strict=True)}
        for phase in phases:
            wanted = [(info.wnid, k) for info in phase.classes for k in range(candidates.ipc)]
            with phase.applied(self.backbone), times.stage("sample"):
                self._fill(candidates, wanted, seed, rows, found)
                ranks.wait()
        if ranks.first:
            self._finish(writer, candidates, provenance, found, times)
        ranks.wait()
        return DistilledDataset(out)

    def _finish(
        self,
        writer: DistilledWriter,
        candidates: DistilledWriter,
        provenance: Mapping[str, Any],
        found: Mapping[str, ClassModes],
        times: StageTimes,
    ) -> None:
        """Select, and write the manifest."""
        chosen: dict[str, list[int]] = {}
        if self.pool > 1:
            with times.stage("select"):
                chosen = self._choose(candidates, writer)
        nearest = {w: [i.key for i in modes.nearest] for w, modes in found.items()}
        masses = {w: modes.modes.masses for w, modes in found.items()}
        classes = writer.dataset.classes
        streams = {info.wnid: chosen.get(info.wnid, range(writer.ipc)) for info in classes}
        writer.finish(provenance, nearest, masses=masses, streams=streams)

    def _fill(
        self,
        writer: DistilledWriter,
        wanted: list[ImageKey],
        seed: int,
        rows: Mapping[str, int],
        found: Mapping[str, ClassModes],
    ) -> None:
        """Make this process's share of the images `wanted`.

        `rows` are the classes' ids by wnid.
        """
        there = {key for key in wanted if writer.has(*key)}
        self.ranks.wait()  # nobody writes before everybody has looked
        size = 1 if there == set(wanted) else self._batch_size(rows[wanted[0][0]])
        size, most = self.ranks.least_and_most(size, self.backbone.device)
        if size < most:
            log.info(
                "compute.batch_size=auto: every process samples %d at once, as the smallest of "
                "their GPUs can; the largest could %d",
                *(size, most),
            )
        parts = [wanted[start : start + size] for start in range(0, len(wanted), size)]
        mine = [part for number, part in enumerate(parts) if self.ranks.mine(number)]
        missing = [part for part in mine if not there.issuperset(part)]
        images, left = (sum(map(len, found)) for found in (mine, missing))
        total, done = images * self._steps, (images - left) * self._steps
        batches, stage, pace = Batches(size, "sampling"), self._stage(left), self._pace
        announce(stage)
        what = f"sampling {images:,} images"
        with (
            progress(what, total, "steps", done, stage, pace) as advance,
            BackgroundWriter(writer, self.work.workers, self.backbone.codec.output_size) as files,
        ):
            for part in missing:
                for keys, latents in self._sampled(part, batches, seed, rows, found, advance):
                    files.write(keys, partial(self._decode(latents).pixels, keys))

    def _sampled(
        self,
        wanted: list[ImageKey],
        batches: Batches,
        seed: int,
        rows: Mapping[str, int],
        found: Mapping[str, ClassModes],
        advance: Callable[..., None],
    ) -> Iterator[tuple[Sequence[ImageKey], Tensor]]:
        """Samples of all `wanted` at once, or of fewer at a time once memory has run out."""
        for attempt in batches.attempts(wanted):
            bar = _BatchBar(advance, len(attempt.part), self.on_step)
            with attempt as keys:
                latents = self.sample(keys, rows, found, seed, bar)
            if attempt.error is None:
                yield attempt.part, latents
            else:
                bar.take_back()

    def _choose(self, candidates: DistilledWriter, writer: DistilledWriter) -> dict[str, list[int]]:
        """Copy the selection of each class into the distilled set; positions by wnid."""
        dataset, ipc = writer.dataset, writer.ipc
        self.select.fit(
            dataset, take_inventory(dataset, "train", ipc, self.work.cache, self.work.workers)
        )
        chosen: dict[str, list[int]] = {}
        for label, info in enumerate(
            track(dataset.classes, "selecting", len(dataset.classes), "classes")
        ):
            images = [candidates.read_image(info.wnid, c) for c in range(candidates.ipc)]
            chosen[info.wnid] = checked(
                self.select(images, label, ipc), len(images), ipc, self.select
            )
            for k, c in enumerate(chosen[info.wnid]):
                writer.write_image(info.wnid, k, images[c])
        return chosen

    @property
    def _steps(self) -> int:
        return self.start.steps(self.sampler.steps)

    @property
    def _guided_steps(self) -> int | None:
        """How many of the steps are guided, None where the guidance does not count them."""
        if not isinstance(self.guidance, ModeGuidance):
            return None
        return self.guidance.guided_steps(self._steps)

    def stages(
        self, dataset: RealDataset, ipc: int, out: Path, inventory: Sequence[ClassImages]
    ) -> list[Stage]:
        """Encoding, modes, fine-tuning, sampling and selection, as far as they are still to do."""
        found: list[Stage] = []
        if self.guidance.needs_modes or self.start.needs_modes:
            pairs = list(zip(dataset.classes, inventory, strict=True))
            codec, finder = self.backbone.codec, self.mode_finder
            found += mode_stages(codec, finder, ipc, self.work, out, pairs)
        tuning: Callable[..., list[Stage]] | None = getattr(self.finetune, "stages", None)
        found += tuning(self.backbone, dataset, inventory, self.work) if tuning else []
        where, count = (out / CANDIDATES, ipc * self.pool) if self.pool > 1 else (out, ipc)
        there = len(list((where / "images").glob("*/*.png")))
        found.append(self._stage(max(0, len(dataset.classes) * count - there), there))
        if self.pool > 1:
            found.append(Stage(what=f"keeps one of {self.pool} candidates for each image"))
        return found

    def _stage(self, images: int, there: int = 0) -> Stage:
        """Sampling so many images."""
        each, already = self._pace.seconds, f" ({there:,} are there)" if there else ""
        guided = "" if self._guided_steps is None else f", {self._guided_steps} of them guided"
        return Stage(
            what=f"samples {images:,} images in {self._steps} steps each{guided}{already}",
            seconds=None if each is None else images * self._steps * each,
            shorter="sampler.steps=… or ipc=…",
            there=images == 0,
        )

    @property
    def _pace(self) -> WorkPace:
        """How long a step of one image takes here, its share of decoding included."""
        backbone = self.backbone
        name = Path(str(getattr(backbone, "weights", type(backbone).__name__))).name
        kind = f"{name}, {backbone.codec.image_size} px, {backbone.precision}"
        guided = f"{type(self.guidance).__name__}, cfg {getattr(self.sampler, 'cfg_scale', 1)}"
        return WorkPace(self.work.cache, f"sampling by {kind}, {guided}", backbone.device)

    def _batch_size(self, class_id: int) -> int:
        if self.work.batch_size != "auto":
            return int(self.work.batch_size)
        backbone = self.backbone

        def one_step(images: int) -> None:
            """A guided step needs a pair of rows for each image."""
            ids = torch.full((2 * images,), class_id, device=backbone.device)
            x_t = torch.zeros(2 * images, *backbone.latent_shape, device=backbone.device)
            with torch.inference_mode(), as_written():
                backbone.predict(x_t, torch.zeros_like(ids), ids)

        return largest_batch(one_step, backbone.device)

    def sample(
        self,
        keys: Sequence[ImageKey],
        rows: Mapping[str, int],
        found: Mapping[str, ClassModes],
        seed: int,
        on_step: Callable[[DenoiseState], None] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of some images; `rows` are the classes' ids by wnid."""
        shape, device = self.backbone.latent_shape, self.backbone.device
        targets = [_target(found[wnid], k) for wnid, k in keys] if found else []
        modes = (
            to_device(torch.stack([t.modes.centers[t.index] for t in targets]), device)
            if targets
            else torch.zeros(len(keys), *shape, device=device)
        )  # (B, C, h, w)
        batch = SamplingBatch(
            class_ids=to_device(torch.tensor([rows[wnid] for wnid, _ in keys]), device),
            modes=modes,
            targets=targets,
            images=keys,
        )
        noise = ImageNoise(seed, keys, shape, device, self._steps - 1)
        return self.sampler(self.backbone, batch, self.guidance, noise, self.start, on_step)

    def pixels(self, keys: Sequence[ImageKey], latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 on the CPU; `UserError` if one or its latent is not finite."""
        return self._decode(latents).pixels(keys)

    def _previews(self, found: Mapping[str, ClassModes]) -> dict[str, Preview]:
        """Decoded centroids and nearest real images of the first modes of the first classes."""
        size, previews = self.backbone.codec.image_size, {}
        for wnid, modes in list(found.items())[:MOST_CLASSES]:
            centers = modes.modes.centers[:MOST_MODES]
            nearest = [center_crop(i.decode(), size) for i in modes.nearest[:MOST_MODES]]
            previews[wnid] = (
                self._decode(centers).pixels([(wnid, k) for k in range(len(centers))]),
                torch.stack([from_pil(image) for image in nearest]),
            )
        return previews


def _target(modes: ClassModes, image: int) -> Target:
    """What the class's image (or candidate) number `image` is steered to."""
    index = image % len(modes.modes.centers)
    return Target(modes=modes.modes, index=index, latents=modes.latents)


class _BatchBar:
    """Advances a bar with a batch's steps, which can be taken back; a user's callback sees them."""

    def __init__(
        self,
        advance: Callable[..., None],
        images: int,
        on_step: Callable[[DenoiseState], None] | None,
    ) -> None:
        self._advance, self._images, self._on_step = advance, images, on_step
        self._steps = 0

    def __call__(self, state: DenoiseState) -> None:
        """One more step."""
        if self._on_step is not None:
            self._on_step(state)
        self._steps += 1
        self._advance(self._images)

    def take_back(self) -> None:
        """The batch comes again, smaller."""
        self._advance(-self._steps * self._images)

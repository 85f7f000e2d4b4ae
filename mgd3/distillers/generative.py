"""Distillation by generation: real latents, modes, guided samples, images."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone, compiles
from mgd3.data.background_writer import BackgroundWriter, write_images
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset, DistilledWriter
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.data.pixels import center_crop, from_pil
from mgd3.data.previews import MOST_CLASSES, MOST_MODES, Preview, load_previews, save_previews
from mgd3.distillers.finished import FinishedLatents, ImageKey
from mgd3.distillers.image_maker import REFINE_BATCH, ImageMaker, Making
from mgd3.distillers.parts import FineTune, Prompts, Sampler, Selection
from mgd3.distillers.pixel_decoder import require_finite
from mgd3.distillers.pool import FirstCandidates, checked
from mgd3.distillers.refining import NoRefinement, Refine
from mgd3.finetuning.phases import NoFineTuning
from mgd3.modes.discovery import ClassModes, discover_modes, mode_stages
from mgd3.modes.finders import ModeFinder
from mgd3.modes.mode_captions import FILE, ClassPrompts, prompt_rows
from mgd3.runtime import checks
from mgd3.runtime.batching import Batches
from mgd3.runtime.compute import Work
from mgd3.runtime.distributed import Ranks
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import progress, track
from mgd3.runtime.stages import Stage, announce, stages_of
from mgd3.sampling.guidance import ModeGuidance
from mgd3.sampling.starts import NoiseStart, Start
from mgd3.sampling.terms import DenoiseState, Guidance, advice_of, fit_part
from mgd3.sampling.watching import BatchBar
from mgd3.storage.files import write_json
from mgd3.storage.timing import StageTimes, WorkPace

log = logging.getLogger(__name__)

CANDIDATES = ".pool"  # hidden, or readers of the set's folder take candidates for its images


class GenerativeDistiller:
    """One generated image per mode (MGD3), or per noise stream where nothing guides.

    Images of all classes are sampled together, `batch_size` at a time. A batch with a missing image
    is sampled again whole, so that a resumed run of the same batch size does the same matrix
    products, and writes the same bytes, as one that was never stopped. Where memory runs out,
    batches are halved and nothing that is written is lost; pixels then agree up to rounding.

    Several processes (`ranks`) take turns at the batches, and write the same bytes as one.

    With `pool` m > 1, m candidates per image are made in `out`/.pool, each from a noise stream of
    its own, and `select` says which are kept. `refine` moves what is kept before it is decoded.

    A guidance that reads finished latents of a class (`needs_finished`) is given those of smaller
    index alone: images of a class then come one after another, classes beside each other, and a
    process has classes of its own.

    `prompts` may give the images of each mode a prompt of their own, kept in `out`/prompts.json.
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
        refine: Refine | None = None,
        prompts: Prompts | None = None,
        pool: int = 1,
        ranks: Ranks | None = None,
        on_step: Callable[[DenoiseState], None] | None = None,
    ) -> None:
        """`start` None begins in pure noise, `finetune` None takes the backbone as it is.

        `prompts` None conditions on the class. `on_step` sees every step of every batch.

        Raises `UserError` for a selection without candidates, and for prompts that the backbone
        does not take.
        """
        self.backbone = backbone
        self.sampler = sampler
        self.guidance = guidance
        self.mode_finder = modes
        self.work = work
        self.start = start or NoiseStart()
        self.finetune = finetune or NoFineTuning()
        self.select = select or FirstCandidates()
        self.prompts = prompts or ClassPrompts()
        self.prompts.check(backbone)
        self.ranks = ranks or Ranks()
        self.on_step = on_step
        self.pool = checks.integer("pool", pool, minimum=1)
        if pool == 1 and not isinstance(self.select, FirstCandidates):
            raise UserError("pool=1 leaves nothing to select; set pool=2 or more, or select=first")
        self.maker = ImageMaker(backbone, sampler, guidance, self.start, refine or NoRefinement())

    def least_real(self, ipc: int) -> int:
        """Each mode is the centre of one real image at least; selection has its own need."""
        return ipc if self.needs_modes or self.pool > 1 else 0

    @property
    def needs_modes(self) -> bool:
        """Do guidance, start or prompts?"""
        return self.maker.needs_modes or self.prompts.needs_modes

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Write `ipc` images per class below `out`; all processes call this at once."""
        ranks = self.ranks
        self.maker.refuse_gradients()
        class_ids = self.backbone.class_ids(dataset.classes)  # loads the weights, or says why not
        if ranks.first:
            self._advise()
        found = self._found(dataset, ipc, out) if self.needs_modes else {}
        prompts = self.prompts.of_modes(dataset.classes, found)
        if ranks.first and prompts:
            write_json(out / FILE, prompts)
        times = StageTimes(out / "times.json", keep=ranks.first)
        if self.maker.learns:
            with times.stage("fit"):
                ranks.in_turn(lambda: self.maker.fit(dataset, self.work))
        with times.stage("finetune"):
            phases = ranks.in_turn(lambda: self.finetune(self.backbone, dataset, self.work))
        writer = DistilledWriter(out, dataset, ipc, seed)
        candidates = writer
        if self.pool > 1:
            candidates = DistilledWriter(out / CANDIDATES, dataset, ipc * self.pool, seed)
        making = Making(
            seed=seed,
            rows={info.wnid: row for info, row in zip(dataset.classes, class_ids, strict=True)},
            labels={info.wnid: label for label, info in enumerate(dataset.classes)},
            found=found,
            finished=self._finished(candidates.folder, ipc),
            own_rows=prompt_rows(self.backbone, prompts),
        )
        chosen: dict[str, list[int]] = {}
        if self.pool > 1 and ranks.first:
            with times.stage("select"):
                self._fit_selection(dataset, ipc)
        for phase in phases:
            wanted = [(info.wnid, k) for info in phase.classes for k in range(candidates.ipc)]
            with phase.applied(self.backbone):
                with times.stage("sample"):
                    self._fill(candidates, wanted, making)
                    ranks.wait()
                if ranks.first and self.pool > 1:  # under the weights that its images are made with
                    with times.stage("select"):
                        self._keep(candidates, writer, making, phase.classes, chosen)
        if ranks.first:
            self._finish(writer, provenance, found, prompts, chosen)
            if making.finished is not None:
                making.finished.forget()
        ranks.wait()
        return DistilledDataset(out)

    def _found(self, dataset: RealDataset, ipc: int, out: Path) -> dict[str, ClassModes]:
        """Modes by wnid, with pictures of the first ones; what prompts lack is said before."""
        work, ranks = self.work, self.ranks
        inventory = partial(take_inventory, dataset, "train", 1, work.cache, work.workers)
        ranks.in_turn(lambda: fit_part(self.prompts, dataset, inventory))
        found = discover_modes(
            dataset, self.backbone.codec, self.mode_finder, ipc, work, out, ranks
        )
        if ranks.first and not load_previews(out):
            save_previews(out, self._previews(found))
        return found

    def _finished(self, folder: Path, ipc: int) -> FinishedLatents | None:
        """Where latents are kept, if anything reads an image's once it is made."""
        maker = self.maker
        if maker.in_order or (maker.refines and self.pool > 1):
            return FinishedLatents(folder, ipc, maker.block)
        return None

    def _batch_size(self, class_id: int) -> int:
        asked = self.work.batch_size
        return self.maker.largest_batch(class_id) if asked == "auto" else int(asked)

    def _finish(
        self,
        writer: DistilledWriter,
        provenance: Mapping[str, Any],
        found: Mapping[str, ClassModes],
        prompts: Mapping[str, Sequence[str]],
        chosen: Mapping[str, Sequence[int]],
    ) -> None:
        """Write the manifest."""
        classes = writer.dataset.classes
        streams = {info.wnid: chosen.get(info.wnid, range(writer.ipc)) for info in classes}
        nearest, masses = {}, {}
        for wnid, modes in found.items():
            own = [stream % len(modes.modes.centers) for stream in streams[wnid]]
            nearest[wnid] = [modes.nearest[k].key for k in own]
            masses[wnid] = modes.modes.masses_of(own)
        own_prompts = {
            wnid: [own[stream % len(own)] for stream in streams[wnid]]
            for wnid, own in prompts.items()
        }
        writer.finish(provenance, nearest, masses=masses, streams=streams, prompts=own_prompts)

    def _fill(self, writer: DistilledWriter, wanted: list[ImageKey], making: Making) -> None:
        """Make this process's share of the images `wanted`."""
        finished = making.finished
        there = {key for key in wanted if writer.has(*key) and (not finished or finished.has(key))}
        self.ranks.wait()  # nobody writes before everybody has looked
        size = 1 if there == set(wanted) else self._batch_size(making.row(wanted[0]))
        size, most = self.ranks.least_and_most(size, self.backbone.device)
        if size < most:
            log.info(
                "compute.batch_size=auto: every process samples %d at once, as the smallest of "
                "their GPUs can; the largest could %d",
                *(size, most),
            )
        mine = self._parts(wanted, size, making)
        missing = [part for part in mine if not there.issuperset(part)]
        images, left = (sum(map(len, parts)) for parts in (mine, missing))
        total, done = images * self._steps, (images - left) * self._steps
        batches, stage, pace = Batches(size, "sampling"), self._stage(left), self._pace
        announce(stage)
        what, first_compiles = f"sampling {images:,} images", compiles(self.backbone)
        with (
            progress(what, total, "steps", done, stage, pace, first_compiles) as advance,
            BackgroundWriter(writer, self.work.workers, self.backbone.codec.output_size) as files,
        ):
            for part in missing:
                for keys, latents in self._sampled(part, batches, making, advance):
                    if finished is not None:
                        require_finite(keys, latents)  # or others would read it
                        finished.add(keys, latents)
                    if self.pool == 1:
                        latents = self.maker.refined(keys, latents, making)
                    files.write(keys, partial(self.maker.decode(latents).pixels, keys))

    def _parts(
        self, wanted: Sequence[ImageKey], size: int, making: Making
    ) -> list[Sequence[ImageKey]]:
        """This process's batches, in order."""
        waves: list[Sequence[ImageKey]] = [wanted]
        if self.maker.in_order and making.finished is not None:
            own = [key for key in wanted if self.ranks.mine(making.labels[key[0]])]
            waves = list(making.finished.waves(own))
        parts = [w[start : start + size] for w in waves for start in range(0, len(w), size)]
        if self.maker.in_order:
            return parts
        return [part for number, part in enumerate(parts) if self.ranks.mine(number)]

    def _sampled(
        self,
        wanted: Sequence[ImageKey],
        batches: Batches,
        making: Making,
        advance: Callable[..., None],
    ) -> Iterator[tuple[Sequence[ImageKey], Tensor]]:
        """Samples of all `wanted` at once, or of fewer at a time once memory has run out."""
        for attempt in batches.attempts(wanted):
            bar = BatchBar(advance, len(attempt.part), self.on_step)
            with attempt as keys:
                latents = self.maker.sample(keys, making, bar)
            if attempt.error is None:
                yield attempt.part, latents
            else:
                bar.take_back()

    def _fit_selection(self, dataset: RealDataset, ipc: int) -> None:
        if isinstance(self.select, FirstCandidates):
            log.warning("pool=%d: select=first leaves all but the first unused", self.pool)
        inventory = take_inventory(dataset, "train", ipc, self.work.cache, self.work.workers)
        self.select.fit(dataset, inventory)

    def _keep(
        self,
        candidates: DistilledWriter,
        writer: DistilledWriter,
        making: Making,
        classes: Sequence[ClassInfo],
        chosen: dict[str, list[int]],
    ) -> None:
        """Choose among each class's candidates; what is chosen, refined, is the distilled set."""
        ipc, size = writer.ipc, self.backbone.codec.output_size
        for info in track(classes, "selecting", len(classes), "classes"):
            wnid = info.wnid
            images = [candidates.read_image(wnid, c) for c in range(candidates.ipc)]
            label = making.labels[wnid]
            kept = checked(self.select(images, label, ipc), len(images), ipc, self.select)
            chosen[wnid] = kept
            if not self.maker.refines:
                for k, c in enumerate(kept):
                    writer.write_image(wnid, k, images[c])
                continue
            assert making.finished is not None
            missing = {k // REFINE_BATCH for k in range(ipc) if not writer.has(wnid, k)}
            left = [k for k in range(ipc) if k // REFINE_BATCH in missing]  # of the same batches
            for attempt in Batches(REFINE_BATCH, "refining").attempts(left):
                with attempt as ks:
                    keys = [(wnid, kept[k]) for k in ks]
                    latents = self.maker.refined(keys, making.finished.of(keys), making)
                    pixels = self.maker.pixels(keys, latents)
                if attempt.error is None:
                    write_images(writer, [(wnid, k) for k in attempt.part], pixels, size)

    def _advise(self) -> None:
        for text in advice_of(self.guidance, self._steps, prod(self.backbone.latent_shape)):
            log.warning("%s", text)

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
        """Encoding, modes, what is learned first, sampling and selection, as far as not done."""
        self.maker.refuse_gradients()
        self._advise()
        found: list[Stage] = []
        fit_part(self.prompts, dataset, lambda: inventory)  # or says what they lack
        if self.needs_modes:
            pairs = list(zip(dataset.classes, inventory, strict=True))
            codec, finder = self.backbone.codec, self.mode_finder
            found += mode_stages(codec, finder, ipc, self.work, out, pairs)
        found += self.maker.stages(dataset, inventory, self.work)
        found += stages_of(self.finetune, self.backbone, dataset, inventory, self.work)
        found += stages_of(self.select, dataset, inventory) if self.pool > 1 else []
        where, count = (out / CANDIDATES, ipc * self.pool) if self.pool > 1 else (out, ipc)
        there = len(list((where / "images").glob("*/*.png")))
        found.append(self._stage(max(0, len(dataset.classes) * count - there), there))
        if self.pool > 1:
            found.append(Stage(what=f"keeps one of {self.pool} candidates for each image"))
        if self.maker.refines:
            count, kind = len(dataset.classes) * ipc, type(self.maker.refine).__name__
            found.append(Stage(what=f"moves the latents of {count:,} images ({kind})"))
        return list(dict.fromkeys(found))  # who comes second finds what the first has encoded

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
        compiled = ", compiled" if compiles(self.backbone) else ""
        kind = f"{name}, {backbone.codec.image_size} px, {backbone.precision}{compiled}"
        guided = f"{self.maker.kind}, cfg {getattr(self.sampler, 'cfg_scale', 1)}"
        return WorkPace(self.work.cache, f"sampling by {kind}, {guided}", backbone.device)

    def _previews(self, found: Mapping[str, ClassModes]) -> dict[str, Preview]:
        """Decoded centroids and nearest real images of the first modes of the first classes."""
        size, previews = self.backbone.codec.image_size, {}
        for wnid, modes in list(found.items())[:MOST_CLASSES]:
            centers = modes.modes.centers[:MOST_MODES]
            nearest = [center_crop(i.decode(), size) for i in modes.nearest[:MOST_MODES]]
            previews[wnid] = (
                self.maker.decode(centers).pixels([(wnid, k) for k in range(len(centers))]),
                torch.stack([from_pil(image) for image in nearest]),
            )
        return previews

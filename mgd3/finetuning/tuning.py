"""Fine-tuning a DiT on the real latents before it generates (Minimax, self-adaptive memory).

Loss = diffusion loss + representativeness * L_r + diversity * L_d, with x0_hat the clean estimate
at a random timestep (Gu et al. 2024, eq. 6 and 8; Li et al. 2025). Both weights zero is the plain
loss that the paper's ImageWoof rows need.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone, Codec
from mgd3.backbones.dit import DiT
from mgd3.backbones.schedule import SamplingSchedule
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.finetuning.averaged_training import AveragedTraining
from mgd3.finetuning.difffit import DiffFit
from mgd3.finetuning.inputs import TrainingLatents, training_latents
from mgd3.finetuning.loss_curves import loss_curve
from mgd3.finetuning.losses import add_noise, diffusion_loss, on_device
from mgd3.finetuning.memories import (
    LOSS_SUMS,
    POLICIES,
    UPDATES,
    LatentMemory,
    diversity_loss,
    representativeness_loss,
    rows_by_class,
)
from mgd3.finetuning.phases import Phase, overwrite
from mgd3.modes.latents import LatentCache, Pair
from mgd3.runtime import checks
from mgd3.runtime.compute import Work, autocast, check_training_precision, to_device, training_in
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import progress
from mgd3.runtime.seeding import stream
from mgd3.runtime.stages import Stage, announce
from mgd3.runtime.stopping import held
from mgd3.storage.cache import cached
from mgd3.storage.files import write_atomic
from mgd3.storage.tensors import tensors_digest
from mgd3.storage.timing import WorkPace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Part:
    """The classes that one training is for, and where its weights go."""

    backbone: DiT
    codec: Codec
    pairs: list[Pair]
    rows: list[int]  # of the conditioning table, one for each class
    path: Path
    made_from: dict[str, str]

    @property
    def classes(self) -> list[ClassInfo]:
        """Without their images."""
        return [info for info, _ in self.pairs]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """DiffFit on the classes' latents, once per cache; at most `classes_per_phase` at a time.

    Step s draws everything from the stream of (seed, s), and checkpoints hold the memories, so a
    killed fine-tuning ends with the same weights as one that ran through.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    ema_decay: float
    label_dropout: float
    representativeness: float  # weight of L_r
    diversity: float  # weight of L_d
    memory_real: int  # N_R, latents of a class
    memory_generated: int  # N_G
    memory_policy: str
    memory_update: str  # batch or epoch
    loss_sum: str  # over a batch's classes: paper or released
    latents: str  # mean or sample of an image's posterior
    flip: float  # probability of an image's mirror image, at each visit
    max_steps: int | None  # no more than these, whatever the epochs
    classes_per_phase: int
    precision: str
    gradient_checkpointing: bool
    checkpoint_steps: int
    seed: int

    def __post_init__(self) -> None:
        for key in (
            "epochs", "batch_size", "memory_real", "memory_generated", "classes_per_phase",
            "checkpoint_steps",
        ):  # fmt: skip
            checks.integer(f"finetune.{key}", getattr(self, key), minimum=1)
        if self.max_steps is not None:
            checks.integer("finetune.max_steps", self.max_steps, minimum=1)
        for key in ("lr", "weight_decay", "representativeness", "diversity"):
            checks.number(f"finetune.{key}", getattr(self, key), minimum=0)
        for key in ("ema_decay", "label_dropout", "flip"):
            checks.number(f"finetune.{key}", getattr(self, key), minimum=0, maximum=1)
        checks.choice("finetune.memory_policy", self.memory_policy, POLICIES)
        checks.choice("finetune.memory_update", self.memory_update, UPDATES)
        checks.choice("finetune.loss_sum", self.loss_sum, LOSS_SUMS)
        checks.choice("finetune.latents", self.latents, ["mean", "sample"])
        check_training_precision(self.precision)
        checks.flag("finetune.gradient_checkpointing", self.gradient_checkpointing)
        checks.integer("finetune.seed", self.seed, minimum=0)

    def __call__(self, backbone: Backbone, dataset: RealDataset, work: Work) -> list[Phase]:
        """The phases of a dataset, each with its weights, trained now unless the cache has them."""
        inventory = take_inventory(dataset, "train", 1, work.cache, work.workers)
        phases = []
        for part in self._parts(backbone, dataset, inventory, work):
            tune = partial(self._tune, part, work)
            cached(part.path, part.made_from, tune)
            phases.append(Phase(part.classes, part.path))
        return phases

    def stages(
        self,
        backbone: Backbone,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        work: Work,
    ) -> list[Stage]:
        """What a call would do: encoding and training, for each phase."""
        found = []
        for part in self._parts(backbone, dataset, inventory, work):
            there = part.path.is_file()
            images = sum(len(found.images) for _, found in part.pairs)
            cache = LatentCache(work.cache / "latents", part.codec, "none")
            encoding = cache.stage([] if there else part.pairs, moments=True)
            found += [encoding, replace(self._stage(part, images, work), there=there)]
        return found

    def _parts(
        self,
        backbone: Backbone,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        work: Work,
    ) -> Iterator[_Part]:
        """The classes of each phase, and the file that its weights are cached in."""
        if not isinstance(backbone, DiT):
            raise UserError(
                f"finetune: {type(backbone).__name__} cannot be fine-tuned, only a DiT; "
                "set finetune=none"
            )
        if backbone.bare.learned_variance is False:
            raise UserError("finetune: this DiT predicts no variance; set finetune=none")
        codec = backbone.finetuning_codec
        kinds = [(c.latent_channels, c.downsampling) for c in (codec, backbone.codec)]
        if kinds[0] != kinds[1]:
            (tuned, its_factor), (sampled, factor) = kinds
            raise UserError(
                f"backbone.finetuning_vae has latents of {tuned} channels and a {its_factor}th of "
                f"an image's side, backbone.vae of {sampled} and a {factor}th; give one of its kind"
            )
        cache = LatentCache(work.cache / "latents", codec, "none")
        network = tensors_digest(backbone.bare.network.state_dict())
        rows = backbone.class_ids(dataset.classes)
        for start in range(0, len(dataset.classes), self.classes_per_phase):
            part = slice(start, start + self.classes_per_phase)
            pairs = list(zip(dataset.classes[part], inventory[part], strict=True))
            made_from = {
                "settings": json.dumps(asdict(self), sort_keys=True),
                "network": network,
                "latents": "\n".join(cache.key(*pair) for pair in pairs),
            }
            digest = hashlib.blake2s(json.dumps(made_from).encode(), digest_size=8).hexdigest()
            path = work.cache / "finetuned" / f"{digest}.safetensors"
            yield _Part(backbone, codec, pairs, rows[part], path, made_from)

    def _steps(self, images: int) -> int:
        per_epoch = max(1, images // self.batch_size)
        return min(self.epochs * per_epoch, self.max_steps or sys.maxsize)

    def _pace(self, part: _Part, work: Work) -> WorkPace:
        name = Path(part.backbone.weights).name
        kind = f"a step of {self.batch_size} latents, {name}, {self.precision}"
        return WorkPace(work.cache, f"fine-tuning by {kind}", part.backbone.device)

    def _stage(self, part: _Part, images: int, work: Work, done: int = 0) -> Stage:
        """Training on so many images' latents from step `done` on."""
        steps, each = self._steps(images), self._pace(part, work).seconds
        return Stage(
            what=f"fine-tunes {Path(part.backbone.weights).name} on the latents of {images:,} real "
            f"images for {steps:,} steps",
            seconds=None if each is None else (steps - done) * each,
            shorter="finetune.max_steps=… or finetune.epochs=…",
        )

    def _tune(self, part: _Part, work: Work) -> dict[str, Tensor]:
        """Train on the latents of a part's classes, whose conditioning rows are its `rows`."""
        folder, sampled = work.cache / "latents", self.latents == "sample"
        latents = training_latents(part.pairs, part.codec, folder, sampled, self.flip, work.workers)
        counts = torch.tensor([len(images.images) for _, images in part.pairs])
        labels = torch.tensor(part.rows).repeat_interleave(counts)
        return self._train(part, latents, labels, work)

    def _train(
        self, part: _Part, latents: TrainingLatents, labels: Tensor, work: Work
    ) -> dict[str, Tensor]:
        """The averaged tensors that differ from the network's own, scales folded in."""
        backbone, path = part.backbone, part.path
        network, device = backbone.bare.network, backbone.device
        before = {k: v.detach().clone() for k, v in network.state_dict().items()}
        fit = DiffFit(network)
        state = AveragedTraining(
            fit.parameters(),
            lr=self.lr,
            weight_decay=self.weight_decay,
            ema_decay=self.ema_decay,
            checkpoint=path.with_suffix(".checkpoint"),
            made_from=part.made_from,
            lr_key="finetune.lr",
            warm_average=False,
        )
        real, generated = (
            LatentMemory(size, self.memory_policy, self.memory_update)
            for size in (self.memory_real, self.memory_generated)
        )
        real.restore("real", state.extra, device)
        generated.restore("generated", state.extra, device)
        per_epoch = max(1, len(latents) // self.batch_size)
        whole = len(backbone.schedule.alphas_cumprod)
        schedule = on_device(backbone.schedule.respaced(whole), device)
        steps = self._steps(len(latents))
        stage, pace = self._stage(part, len(latents), work, state.step), self._pace(part, work)
        announce(stage)
        if self.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        try:
            with (
                fit.training(),
                progress("fine-tuning", steps, "steps", state.step, stage, pace) as advance,
                held() as asked,
            ):
                while state.step < steps and not asked():
                    epoch, k = divmod(state.step, per_epoch)
                    order = torch.randperm(
                        len(latents), generator=stream("finetune", self.seed, "epoch", epoch)
                    )
                    batch = order[k * self.batch_size : (k + 1) * self.batch_size]
                    draw = stream("finetune", self.seed, state.step, "input")
                    x0, y = latents.at(batch, draw), labels[batch]
                    with training_in(self.precision):
                        loss = self._loss(backbone, schedule, x0, y, state.step, real, generated)
                        state.learn(loss)
                    if k == per_epoch - 1:
                        real.end_epoch()
                        generated.end_epoch()
                    advance(1, note=f"loss {state.recent_loss:.4f}")
                    due = state.step % self.checkpoint_steps == 0 and state.step < steps
                    if due or asked():
                        state.extra = real.state("real") | generated.state("generated")
                        state.save()
            with state.averaged():
                fit.fold()
                after = {k: v.detach().clone() for k, v in network.state_dict().items()}
        finally:
            network.disable_gradient_checkpointing()
            overwrite(network, before)
        write_atomic(path.with_suffix(".loss.png"), loss_curve(state.losses))
        log.info("fine-tuned weights: %s, loss curve beside them", path)
        path.with_suffix(".checkpoint").unlink(missing_ok=True)
        return {k: v for k, v in after.items() if not torch.equal(v, before[k])}

    def _loss(
        self,
        backbone: DiT,
        schedule: SamplingSchedule,
        x0: Tensor,
        labels: Tensor,
        step: int,
        real: LatentMemory,
        generated: LatentMemory,
    ) -> Tensor:
        """Of latents x0 (B, C, h, w) of `labels` (B,), on the CPU; extends the memories."""
        draw = stream("finetune", self.seed, step)
        t = torch.randint(1000, (len(x0),), generator=draw)
        dropped = torch.rand(len(x0), generator=draw) < self.label_dropout
        eps = torch.randn(x0.shape, generator=draw).to(x0)
        shown = torch.where(dropped, backbone.null_class, labels)
        x0, t, eps, shown, rows = to_device(
            (x0, t, eps, shown, rows_by_class(labels)), backbone.device
        )
        x_t = add_noise(x0, eps, t, schedule)
        network = backbone.bare.network
        with autocast(self.precision, x0.device):
            out = network(x_t, timestep=t, class_labels=shown, return_dict=False)[0]
        out = out.float()
        loss = diffusion_loss(out, x0, x_t, eps, t, schedule).mean()
        if not self.representativeness and not self.diversity:
            return loss
        abar = schedule.abar.to(x0)[t].view(-1, 1, 1, 1)
        x0_hat = x_t / abar.sqrt() - (1 / abar - 1).sqrt() * out[:, : x0.shape[1]]
        l_r = representativeness_loss(x0_hat, rows, real, self.loss_sum)
        l_d = diversity_loss(x0_hat, rows, generated, self.loss_sum)
        loss = loss + self.representativeness * l_r + self.diversity * l_d
        for label, of_label in rows.items():
            real.extend(label, x0[of_label])
            generated.extend(label, x0_hat[of_label])
        return loss

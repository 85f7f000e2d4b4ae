"""Distillation by matching: images whose mean features are the real ones' (DM)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mgd3.data.datasets import RealDataset, RealImage
from mgd3.data.distilled import DistilledDataset, DistilledWriter
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.data.pixels import to_pil
from mgd3.distillers.parts import OfRealImages
from mgd3.distillers.siamese_augmentation import SiameseAugmentation
from mgd3.finetuning.loss_record import Losses
from mgd3.runtime import checks
from mgd3.runtime.compute import Work, to_device, training_in
from mgd3.runtime.errors import CorruptFileError, UserError, reading
from mgd3.runtime.progress import progress
from mgd3.runtime.seeding import stream
from mgd3.runtime.stages import Stage, announce
from mgd3.runtime.stopping import held
from mgd3.storage.tensors import load_tensors, save_tensors
from mgd3.storage.timing import StageTimes, WorkPace

_EMBED_BATCH = 256


class RandomEmbeddings(Protocol):
    """Networks with fresh weights, and the images that they take."""

    device: torch.device

    def read(self, images: Sequence[RealImage]) -> Tensor:
        """Network inputs (N, 3, H, W) float32, on the CPU."""

    def pixels(self, inputs: Tensor) -> Tensor:
        """Network inputs as pixels (N, 3, H, W) uint8."""

    def network(self, seed: int, num_classes: int) -> Callable[[Tensor], Tensor]:
        """Inputs (B, 3, H, W) to embeddings (B, D), differentiable, weights frozen."""


class DistributionMatching(OfRealImages):
    """Zhao & Bilen 2023: in every iteration a fresh network, and for each class one augmentation.

    loss = sum over classes of || mean embed(A(real)) - mean embed(A(synthetic)) ||^2; SGD on the
    pixels, which begin as random real images. Iteration i draws everything from the stream of
    (seed, i), so a killed run ends with the same images.
    """

    def __init__(
        self,
        features: RandomEmbeddings,
        work: Work,
        iterations: int,
        lr: float,
        momentum: float,
        real_batch: int,
        augmentations: Sequence[str],
        checkpoint_iterations: int,
    ) -> None:
        self.features = features
        self.work = work
        self.iterations = checks.integer("method.iterations", iterations, minimum=1)
        self.lr = checks.number("method.lr", lr, minimum=0)
        self.momentum = checks.number("method.momentum", momentum, minimum=0, maximum=1)
        self.real_batch = checks.integer("method.real_batch", real_batch, minimum=1)
        self.augmentation = SiameseAugmentation(augmentations)
        self.checkpoint_iterations = checks.integer(
            "method.checkpoint_iterations", checkpoint_iterations, minimum=1
        )

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Write `ipc` images per class below `out`, at the students' size."""
        times = StageTimes(out / "times.json")
        with times.stage("check"):
            inventory = take_inventory(dataset, "train", ipc, self.work.cache, self.work.workers)
        writer, checkpoint = DistilledWriter(out, dataset, ipc, seed), out / "matching.safetensors"
        if not all(writer.has(info.wnid, k) for info in dataset.classes for k in range(ipc)):
            with times.stage("match"):
                real = [self.features.read(found.images) for found in inventory]  # (N_c, 3, H, W)
                made = self._match(real, ipc, seed, checkpoint)
            for info, images in zip(dataset.classes, made, strict=True):
                for k, pixels in enumerate(self.features.pixels(images)):
                    writer.write_image(info.wnid, k, to_pil(pixels))
        checkpoint.unlink(missing_ok=True)
        writer.finish(provenance, {})
        return DistilledDataset(out)

    def stages(
        self, dataset: RealDataset, ipc: int, out: Path, inventory: Sequence[ClassImages]
    ) -> list[Stage]:
        """The matching, and what of it is done."""
        try:
            done = int(load_tensors(out / "matching.safetensors")["iteration"])
        except (FileNotFoundError, CorruptFileError, KeyError):
            done = 0
        return [self._stage(len(dataset.classes), ipc, done)]

    def _pace(self, num_classes: int, ipc: int) -> WorkPace:
        name = getattr(self.features, "student", type(self.features).__name__)
        size = getattr(self.features, "image_size", "?")
        kind = f"matching {num_classes} x {ipc} images to {self.real_batch} by {name} at {size} px"
        return WorkPace(self.work.cache, kind, self.features.device)

    def _stage(self, num_classes: int, ipc: int, done: int) -> Stage:
        each, left = self._pace(num_classes, ipc).seconds, self.iterations - done
        already = f", {done:,} of them done" if done else ""
        return Stage(
            what=f"matches {num_classes * ipc:,} images to the real ones in {self.iterations:,} "
            f"iterations{already}",
            seconds=None if each is None else left * each,
            shorter="method.iterations=…",
        )

    def _match(self, real: list[Tensor], ipc: int, seed: int, checkpoint: Path) -> Tensor:
        """Synthetic network inputs (classes, ipc, 3, H, W)."""
        device, done = self.features.device, 0
        rows = [torch.randperm(len(x), generator=stream(seed, "dm", c)) for c, x in enumerate(real)]
        made = torch.stack([x[r[:ipc]] for x, r in zip(real, rows, strict=True)])
        velocity = torch.zeros_like(made)
        try:
            state = load_tensors(checkpoint)
            with reading(checkpoint, "it is of another matching", CorruptFileError):
                made, velocity, done = state["images"], state["velocity"], int(state["iteration"])
        except (FileNotFoundError, CorruptFileError):
            pass  # from the start
        made, velocity = made.to(device).requires_grad_(), velocity.to(device)
        stage, pace = self._stage(len(real), ipc, done), self._pace(len(real), ipc)
        losses = Losses(
            lambda step, loss: UserError(
                f"the matching loss is {loss} in iteration {done + step}; lower method.lr (now "
                f"{self.lr})"
            )
        )
        announce(stage)
        with (
            progress(
                "matching distributions", self.iterations, "iterations", done, stage, pace
            ) as advance,
            held() as asked,
        ):
            for i in range(done, self.iterations):
                with training_in("float32"):
                    loss = self._loss(real, made, seed, i)
                    losses.add(loss)
                    (gradient,) = torch.autograd.grad(loss, made)
                velocity.mul_(self.momentum).add_(gradient)
                with torch.no_grad():
                    made -= self.lr * velocity
                advance(1, note=f"loss {losses.recent(1):.3f}")
                if (i + 1) % self.checkpoint_iterations == 0 or asked():
                    losses.all()  # of one that diverged nothing is kept
                    state = {"images": made.detach(), "velocity": velocity}
                    save_tensors(checkpoint, state | {"iteration": torch.tensor(i + 1)}, {})
                if asked():
                    break
        losses.all()
        return made.detach().cpu()

    def _loss(self, real: list[Tensor], made: Tensor, seed: int, iteration: int) -> Tensor:
        draw, device = stream(seed, "dm iteration", iteration), self.features.device
        network = self.features.network(
            int(torch.randint(2**31, (), generator=draw)), num_classes=len(real)
        )
        loss = torch.zeros((), device=device)
        for x, images in zip(real, made, strict=True):
            rows = torch.randperm(len(x), generator=draw)[: self.real_batch]
            apply = self.augmentation.draw(draw)
            with torch.no_grad():
                parts = [
                    network(apply(to_device(part, device))) for part in x[rows].split(_EMBED_BATCH)
                ]
            gap = torch.cat(parts).mean(dim=0) - network(apply(images)).mean(dim=0)
            loss = loss + gap.square().sum()
        return loss

"""Gradients of students: of one image, and of a class's real images."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.images import read_pixels
from eval.pixel_files import held_or_mapped
from eval.protocols.augmentation import normalise
from eval.protocols.teachers import Place
from mgd3.data.inventory import ClassImages
from mgd3.runtime.compute import training_in
from mgd3.storage.cache import cached
from mgd3.storage.tensors import tensors_digest

_BATCH = 50  # images of a real gradient at once; the mean does not depend on it


@dataclass(frozen=True)
class StudentSnapshot:
    """A student at one moment, in eval mode: batch norm, too, then looks at one image alone."""

    net: nn.Module  # the architecture; its own weights play no part
    state: Mapping[str, Tensor]
    image_size: int
    inputs: str  # what it is shown: imagenet (normalised as in training) or decoder ([-1, 1])

    def gradient(self, images: Tensor, label: int) -> Tensor:
        """Of the mean cross-entropy of images (B, 3, H, W) in [-1, 1] in all parameters, (P,).

        It has a graph to images that require a gradient.
        """
        names = dict(self.net.named_parameters())
        # fused attention has no second derivative
        with torch.enable_grad(), training_in("float32"), sdpa_kernel(SDPBackend.MATH):
            tensors = {
                name: tensor.detach().requires_grad_(name in names)
                for name, tensor in self.state.items()
            }
            logits = functional_call(self.net, tensors, (self._prepared(images),))
            loss = F.cross_entropy(logits, torch.full((len(images),), label).to(logits.device))
            parts = torch.autograd.grad(
                loss,
                [tensors[name] for name in names],
                create_graph=images.requires_grad,
                materialize_grads=True,
            )
        return torch.cat([part.flatten() for part in parts])

    def _prepared(self, images: Tensor) -> Tensor:
        """Resized to the student's size, (B, 3, S, S)."""
        images = images.to(next(self.net.parameters()))
        if images.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return normalise((images + 1) / 2) if self.inputs == "imagenet" else images

    @cached_property
    def digest(self) -> str:
        """Of its weights, and of how it is shown images."""
        return f"{tensors_digest(dict(self.state))}/{self.image_size}/{self.inputs}"


@dataclass(frozen=True)
class RealGradients:
    """Each class's mean gradient over its first `count` real images."""

    inventory: Sequence[ClassImages]
    count: int
    image_size: int
    place: Place

    def of(self, snapshot: StudentSnapshot, label: int) -> Tensor:
        """(P,), on the CPU."""
        mine = self._pixels[self._starts[label] : self._starts[label + 1]]
        total = torch.zeros(())
        for part in mine.split(_BATCH):
            images = part.to(self.place.device).float() / 127.5 - 1
            total = total + len(part) * snapshot.gradient(images, label).cpu()
        return total / len(mine)

    def kept(self, snapshot: StudentSnapshot, label: int) -> Tensor:
        """The same, read from the cache where it is there."""
        digests = self.inventory[label].digests[: self.count]
        text = "\n".join([snapshot.digest, str(label), *digests])
        name = hashlib.blake2s(text.encode(), digest_size=16).hexdigest()
        path = self.place.cache / "gradients" / name[:2] / f"{name}.safetensors"
        made: dict[str, Tensor] = cached(
            path, {}, lambda: {"mean": self.of(snapshot, label)}, lock="class"
        )
        return made["mean"]

    @cached_property
    def _starts(self) -> list[int]:
        """Where each class begins among the pixels, and the end of the last."""
        starts = [0]
        for found in self.inventory:
            starts.append(starts[-1] + len(found.images[: self.count]))
        return starts

    @cached_property
    def _pixels(self) -> Tensor:
        """Of all classes, (N, 3, S, S) uint8 on the CPU or in a file."""
        images = [image for found in self.inventory for image in found.images[: self.count]]
        digests = [d for found in self.inventory for d in found.digests[: self.count]]
        return held_or_mapped(
            read_pixels(images, self.image_size, self.place.workers),
            (len(images), 3, self.image_size, self.image_size),
            [str(self.image_size), *digests],
            torch.device("cpu"),
            self.place.cache,
            "first",
        )


def distinct(epochs: Iterable[int], cosine: Callable[[int, int], float], below: float) -> list[int]:
    """Epochs whose gradients differ: the first, then each whose cosine to the last kept is low."""
    kept: list[int] = []
    for epoch in epochs:
        if not kept or cosine(kept[-1], epoch) < below:
            kept.append(epoch)
    return kept


@dataclass(frozen=True)
class FittedTrajectory:
    """A student's kept snapshots, and the real gradients at each."""

    snapshots: Sequence[StudentSnapshot]
    gradients: RealGradients

    def real(self, label: int) -> Tensor:
        """By snapshot the mean gradient of a class's real images, (E, P), on the CPU."""
        return torch.stack([self.gradients.kept(s, label) for s in self.snapshots])

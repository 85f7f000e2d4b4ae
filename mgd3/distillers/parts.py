"""What a method is built of: each part is one group of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor

from mgd3.backbones.contract import Backbone
from mgd3.data.class_lists import ClassInfo
from mgd3.data.datasets import RealDataset
from mgd3.data.distilled import DistilledDataset
from mgd3.data.inventory import ClassImages
from mgd3.modes.discovery import ClassModes
from mgd3.runtime.compute import Work
from mgd3.sampling.samplers import NoiseSource
from mgd3.sampling.starts import Start
from mgd3.sampling.terms import DenoiseState, Guidance, SamplingBatch, fit_part


class Phase(Protocol):
    """Some classes and the weights that generate them."""

    classes: Sequence[ClassInfo]

    def applied(self, backbone: Backbone) -> AbstractContextManager[None]:
        """The backbone has these weights inside this block."""


class FineTune(Protocol):
    """What is done to a backbone before it generates."""

    def __call__(self, backbone: Backbone, dataset: RealDataset, work: Work) -> Sequence[Phase]:
        """Phases that together hold all classes, in order."""


class FeatureExtractor(Protocol):
    """A network trained on the full real set of some classes."""

    def real(self, label: int) -> Tensor:
        """Features (N, D) of a class's real images, in their order."""

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, classes)."""


class FeatureSpace(Protocol):
    """Where images are compared."""

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> FeatureExtractor:
        """The extractor of these classes, trained now unless the cache has it."""


class Selection(Protocol):
    """Which candidates a distilled dataset keeps."""

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> None:
        """Learn what choosing needs; called once, before the first choice."""

    def __call__(self, candidates: Sequence[Image.Image], label: int, ipc: int) -> list[int]:
        """`ipc` different positions; the order of choice is the order of the images.

        Candidate c belongs to mode c % ipc.
        """


class Prompts(Protocol):
    """What the images of a class are conditioned on, beside the class.

    It may have `fit`, called once before any mode is found (`terms.fit_part`).
    """

    needs_modes: bool

    def check(self, backbone: Any) -> None:
        """Raise `UserError` for a backbone, or a class of backbones, that takes no prompts."""

    def of_modes(
        self, classes: Sequence[ClassInfo], found: Mapping[str, ClassModes]
    ) -> dict[str, list[str]]:
        """A prompt for each mode, by wnid; empty where an image has its class's."""


class Sampler(Protocol):
    """Reverse process, batched over images of any classes."""

    steps: int

    def __call__(
        self,
        backbone: Backbone,
        batch: SamplingBatch,
        guidance: Guidance,
        noise: NoiseSource,
        start: Start | None = None,
        on_step: Callable[[DenoiseState], None] | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of a batch."""


class OfRealImages:
    """A distiller that chooses among real images, or begins with some: `ipc` of each class."""

    def least_real(self, ipc: int) -> int:
        """How many real training images each class must have."""
        return ipc


def least_real(distiller: Distiller, ipc: int) -> int:
    """How many real training images a method needs of each class; 0 where it does not say so."""
    return distiller.least_real(ipc) if hasattr(distiller, "least_real") else 0


def refuse_classes(distiller: Distiller, dataset: RealDataset) -> None:
    """`UserError` for a class that the backbone cannot know, if that needs no weights."""
    refuse = getattr(getattr(distiller, "backbone", None), "refuse_classes", None)
    if refuse is not None:
        refuse(dataset.classes)


def refuse_captions(
    distiller: Distiller, dataset: RealDataset, inventory: Callable[[], Sequence[ClassImages]]
) -> None:
    """`UserError` for prompts that the real images do not have, before anything is made."""
    fit_part(getattr(distiller, "prompts", None), dataset, inventory)


class Distiller(Protocol):
    """Makes a distilled dataset; goes on from whatever its folder already holds.

    Under torchrun all processes call one whose constructor takes `ranks`; of any other the first
    process alone. It may have `stages(dataset, ipc, out, inventory) -> list[Stage]`: what it would
    do, for a plan.
    """

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Write `ipc` images per class below `out`; `provenance` goes into the manifest."""

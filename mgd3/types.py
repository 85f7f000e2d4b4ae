"""Glossary, shape letters, and the Protocols that the parts of a run meet at.

Shape letters: N real images, K modes of a class, B batch, C h w latent, H W pixels.

images    (B, 3, H, W) float32 in [-1, 1]
latents   (B, C, h, w) what the diffusion model sees, always scaled; for a pixel-space backbone
          they are pixels
x_t       noisy latents; x0_hat the clean estimate; eps the noise; abar the schedule's alpha-bar
t         training timestep, 0..999; step: index of a sampling step, num_steps-1 down to 0
wnid      a class's key: its ImageNet synset, or its folder's name
label     the class's position in its dataset, the student's target
class_id  the class's row in the backbone's conditioning table: labels, or encoded prompts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:  # annotations only: this module imports nothing of the project
    from mgd3.class_lists import ClassInfo
    from mgd3.datasets import RealDataset
    from mgd3.discovery import Work
    from mgd3.distilled import DistilledDataset
    from mgd3.inventory import ClassImages
    from mgd3.schedule import NoiseSchedule, SamplingSchedule


class UserError(ValueError):
    """Something its reader can mend: a wrong value, a missing file, a full disk.

    The message names the key or path, the value, what is allowed and what to do next;
    `run.py` prints it without a traceback.
    """


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A backbone's output for noisy latents."""

    eps: Tensor  # (B, C, h, w) predicted noise
    variance: Tensor | None = None  # (B, C, h, w) in [-1, 1], between the two log-variance bounds


@dataclass(frozen=True, kw_only=True)
class DenoiseState:
    """One reverse step as a guidance term sees it: the images' own half, no CFG twin."""

    step: int  # sampling step, num_steps-1 down to 0
    num_steps: int
    x_t: Tensor  # (B, C, h, w)
    x0_hat: Tensor  # (B, C, h, w)


@dataclass(frozen=True, kw_only=True)
class Modes:
    """The modes of one class; rows follow the mode finder's order."""

    centers: Tensor  # (K, C, h, w) float32
    counts: Tensor  # (K,) int64, real images per mode
    assignment: Tensor  # (N,) int64, each real image's mode
    nearest: Tensor  # (K,) int64, the real image nearest to each center
    spread: Tensor  # () RMS distance of the latents to their modes, per element

    @property
    def masses(self) -> list[float]:
        """Each mode's share of the real images."""
        return (self.counts / self.counts.sum()).tolist()


@dataclass(frozen=True, kw_only=True)
class Target:
    """What one image is steered to."""

    modes: Modes  # its class's
    index: int  # its own among them
    latents: Callable[[], Tensor]  # reads the class's real latents, (N, C, h, w)


class Codec(Protocol):
    """Pixels to latents and back; heavy weights load on first use."""

    image_size: int  # pixels that the network works on
    output_size: int  # pixels of the files that are written
    samples_latents: bool  # whether an image's latent depends on its key

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along one side."""

    @property
    def id(self) -> str:
        """Identifies everything that latents depend on; part of the latent cache's key."""

    def encode(self, images: Tensor, keys: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) to latents (B, C, h, w); a key names its image's random stream."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) to images (B, 3, H, W), not clamped."""


class Backbone(Protocol):
    """A diffusion model and its codec; heavy weights load on first use."""

    codec: Codec
    device: torch.device
    precision: str  # in which it computes; weights and predictions are float32

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The training noise, and which of its timesteps samplers visit."""

    @property
    def null_class(self) -> int:
        """The row that stands for «no class» in classifier-free guidance."""

    def class_ids(self, classes: Sequence[ClassInfo]) -> list[int]:
        """Rows of the conditioning table; raises `UserError` for a class it cannot have."""

    def predict(self, x_t: Tensor, t: Tensor, class_ids: Tensor) -> Prediction:
        """Noise (and variance) of x_t (B, C, h, w) at training timesteps t (B,)."""


class ModeFinder(Protocol):
    """Finds K representative points of one class's latents (paper section 4.1)."""

    def __call__(self, latents: Tensor, num_modes: int) -> Modes:
        """Modes of latents (N, C, h, w), N >= num_modes."""


class GuidanceTerm(Protocol):
    """What a sampler asks at every step."""

    def __call__(self, state: DenoiseState, modes: Tensor) -> Tensor:
        """g_t, the shape of `state.x0_hat`; `modes` holds each row's own mode."""


class Guidance(Protocol):
    """A term added to every reverse step (paper section 4.2)."""

    needs_modes: bool

    def check(self, num_steps: int) -> None:
        """Raise `UserError` if the settings make no sense for this many sampling steps."""

    def bound(self, rows: Sequence[Target], typical_spread: float) -> GuidanceTerm:
        """The term of one batch, whose row b is steered to `rows[b]`.

        `typical_spread` is the mean over the dataset's classes.
        """

    def __call__(self, state: DenoiseState, modes: Tensor) -> Tensor:
        """The term of rows of which nothing but their own mode is known."""


class Phase(Protocol):
    """Some classes and the weights that generate them."""

    classes: Sequence[ClassInfo]

    def applied(self, backbone: Backbone) -> AbstractContextManager[None]:
        """The backbone has these weights inside this block."""


class FineTune(Protocol):
    """What is done to a backbone before it generates."""

    def __call__(self, backbone: Backbone, dataset: RealDataset, work: Work) -> Sequence[Phase]:
        """Phases that together hold all classes, in order."""


class Start(Protocol):
    """Where the reverse process begins."""

    needs_modes: bool

    def steps(self, num_steps: int) -> int:
        """How many of `num_steps` sampling steps are taken."""

    def initial(self, schedule: SamplingSchedule, modes: Tensor, noise: Tensor) -> Tensor:
        """x at the first of them, (B, C, h, w)."""


class Judge(Protocol):
    """A network trained on the full real set of some classes."""

    def real(self, label: int) -> Tensor:
        """Features (N, D) of a class's real images, in their order."""

    def __call__(self, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
        """Features (B, D) and logits (B, classes)."""


class FeatureSpace(Protocol):
    """Where images are compared."""

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> Judge:
        """The judge of these classes, trained now unless the cache has it."""


class Selection(Protocol):
    """Which candidates a distilled dataset keeps."""

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> None:
        """Learn what choosing needs; called once, before the first choice."""

    def __call__(self, candidates: Sequence[Image.Image], label: int, ipc: int) -> list[int]:
        """The chosen positions, one for each k < ipc, among those with position % ipc == k."""


class NoiseSource(Protocol):
    """Where a batch's random numbers come from; drawn strictly in order."""

    def initial(self) -> Tensor:
        """x_T, (B, C, h, w)."""

    def step(self) -> Tensor:
        """The next reverse step's z, (B, C, h, w)."""


class Sampler(Protocol):
    """Reverse process, batched over images of any classes."""

    steps: int

    def __call__(
        self,
        backbone: Backbone,
        class_ids: Tensor,
        guidance: GuidanceTerm,
        modes: Tensor,
        noise: NoiseSource,
        on_step: Callable[[], None] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of `class_ids` (B,), each steered by its row of `modes`."""


class Distiller(Protocol):
    """Makes a distilled dataset; goes on from whatever its folder already holds.

    Under torchrun all processes call one whose constructor takes `ranks`; of any other the first
    process alone.
    """

    def distill(
        self, dataset: RealDataset, ipc: int, seed: int, out: Path, provenance: Mapping[str, Any]
    ) -> DistilledDataset:
        """Write `ipc` images per class below `out`; `provenance` goes into the manifest."""

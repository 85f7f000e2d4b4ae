"""What a protocol answers: recipes, objectives, teachers, and the contract of protocols."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn

from eval.images import TestImages
from eval.protocols.mixing import Mix, draw_mix


@dataclass(frozen=True, kw_only=True)
class Steps:
    """A learning rate that is multiplied by gamma after each milestone, in epochs."""

    milestones: tuple[int, ...]
    gamma: float

    def factor(self, epoch: int) -> float:
        """Of the base rate in epoch 0, 1, ..."""
        return self.gamma ** sum(epoch >= m for m in self.milestones)


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """0.5 (1 + cos(pi e / period)): to zero over one period of epochs."""

    period: float

    def factor(self, epoch: int) -> float:
        """Of the base rate in epoch 0, 1, ..."""
        return 0.5 * (1 + math.cos(math.pi * epoch / self.period))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One student's optimisation; durations are in epochs."""

    epochs: int
    batch_size: int
    optimizer: str  # sgd (with momentum) or adamw
    lr: float
    momentum: float
    weight_decay: float
    decay: str  # all, or weights: only what has more than one dimension and «weight» in its name
    schedule: Steps | Cosine
    tests: tuple[int, ...]  # finished epochs after which the student is tested
    precision: str  # float32, tf32 or bfloat16 (autocast)

    def make_optimizer(self, student: nn.Module) -> torch.optim.Optimizer:
        """The optimiser of a student's parameters."""
        named = dict(student.named_parameters())
        decayed = [n for n, p in named.items() if self.decay == "all" or _is_weight(n, p)]
        groups = [
            {"params": [named[n] for n in decayed], "weight_decay": self.weight_decay},
            {"params": [p for n, p in named.items() if n not in decayed], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        fused = True if next(student.parameters()).device.type == "cuda" else None
        if self.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=self.lr, fused=fused)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, fused=fused)


def _is_weight(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and "weight" in name


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A network whose answers a protocol's students learn."""

    name: str
    source: str  # where it comes from: trained here, RDED's file, torchvision's
    top1: float  # percent of the real test images
    network: nn.Module  # in eval mode; normalised images to logits


class Plan(NamedTuple):
    """All that is random in a batch: drawn on the CPU, and moved to the device at once."""

    draws: Any  # of the protocol's augmentation
    mix: Mix | None


def draw_plan(augmentation: Any, count: int, size: tuple[int, int], generator: Generator) -> Plan:
    """A batch's augmentation, then its CutMix, in the order that streams are drawn in."""
    draws = augmentation.draw(count, size, generator)
    mixed = augmentation.mixed_size(size)
    return Plan(draws, draw_mix(augmentation.cutmix, count, mixed, generator))


class Learner(Protocol):
    """The student in training mode, as an objective sees it."""

    def predict(self, images: Tensor) -> Tensor:
        """Float32 logits (B, classes) of normalised images (B, 3, H, W)."""

    def pass_unread(self, images: Tensor) -> None:
        """A pass whose logits nobody reads: it moves batch norm's statistics."""


class Objective(Protocol):
    """What a student learns from a batch."""

    def begin(self, student_seed: int, epoch: int) -> Generator:
        """An epoch begins: where all its random numbers come from."""

    def plan(self, count: int, size: tuple[int, int], generator: Generator) -> Plan:
        """What is random in a batch of `count` images of `size`."""

    def __call__(
        self,
        learner: Learner,
        pixels: Tensor,
        target: Tensor,
        rows: Tensor,
        plan: Plan,
        mine: slice,
    ) -> Tensor:
        """The mean loss of the images `mine` of a batch, all of which is augmented.

        Pixels (B, 3, H, W) uint8, labels (B,), positions in the set (B,).
        """


class EvalProtocol(Protocol):
    """Trains and tests one student."""

    name: str
    image_size: int  # pixels that students see
    stored_size: int  # pixels of training images before augmentation
    test_resize: int  # shorter side of test images before the centre crop to image_size
    image_weights: str  # «none», or «mass»: by the share of real images that each stands for
    labels: str  # hard: the classes; soft: a teacher's answers
    augmented: bool  # False: students see every image as it is

    def recipe(self, ipc: int, num_classes: int, student: str) -> Recipe:
        """How one student is trained; `UserError` for a set that the protocol has no rule for."""

    def prepare(self, test: TestImages, device: torch.device) -> Teacher | None:
        """Load or train what the students learn from; called once, before all of them."""

    def objective(self, pixels: Tensor, weights: Tensor | None) -> Objective:
        """One student's loss on pixels (N, 3, H, W); `weights` (N,) multiplies each image's."""

"""A guided step against a plain one, by how far into the network its term looks (`Reach`).

Every step is guided. A distance costs nothing but its gradient; the other terms do their own work
beside it: influence decodes and differentiates a student, the prior looks at real images.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.metrics.gradients import StudentSnapshot
from eval.students.registry import make_student
from mgd3.backbones.dit import BareDiT, DiT
from mgd3.data.datasets import RealDataset
from mgd3.data.digits import Digits
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.runtime.compute import Compute, Work
from mgd3.runtime.machine import keep_freed_memory
from mgd3.runtime.stages import Stage
from mgd3.sampling.guidance import ModeGuidance, NoGuidance
from mgd3.sampling.guidances.deviation import DeviationGuidance
from mgd3.sampling.guidances.influence import InfluenceGuidance
from mgd3.sampling.guidances.prior import PriorGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDIM
from mgd3.sampling.terms import (
    DenoiseState,
    Guidance,
    Reach,
    SamplingBatch,
    fit_part,
    gradient,
)
from scripts.timings.sampling import DIGITS, SIZES, random_dit
from scripts.timings.stopwatch import Report, default_device, synchronise

ENOUGH = 3.0  # seconds of passes: small networks take milliseconds
SNAPSHOTS, MEMORY = 4, 64  # of influence; finished images that deviation looks at
TERMS = ("plain", "mode", "deviation", "clean", "denoiser", "prior", "influence")


@dataclass(frozen=True)
class Distance:
    """Lowers |x0_hat|^2 through as much of the network as `far` says."""

    far: Reach
    needs_modes = False

    @property
    def reach(self) -> Reach:
        """Of every step."""
        return self.far

    def check(self, num_steps: int) -> None:
        """Anything goes."""

    def bind(self, batch: SamplingBatch) -> Distance:
        """Itself: no row has anything of its own."""
        return self

    def __call__(self, state: DenoiseState) -> Tensor:
        """g_t, (B, C, h, w)."""
        return -0.01 * gradient(state, lambda: state.x0_hat.square().sum(dim=(1, 2, 3)))


class Untrained:
    """A surrogate whose students have learned nothing: what they cost is the same."""

    def __init__(self, device: str) -> None:
        self._net = make_student("convnet3_w64", 10, 8, seed=0).to(device).eval()
        state = dict(self._net.state_dict())
        self.snapshots = [StudentSnapshot(self._net, state, 8, "imagenet")] * SNAPSHOTS

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> Untrained:
        """Itself: it is its own trajectory."""
        return self

    def stages(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> list[Stage]:
        """None."""
        return []

    def real(self, label: int) -> Tensor:
        """A direction for each snapshot, (E, P)."""
        size = sum(p.numel() for p in self._net.parameters())
        return torch.randn(SNAPSHOTS, size, generator=torch.Generator().manual_seed(label))


def made(term: str, steps: int, device: str) -> Guidance:
    """One of TERMS, acting in all steps."""
    last = steps - 1
    if term == "influence":
        return InfluenceGuidance(5, 0.0015, 0, last, Untrained(device))
    if term == "prior":
        return PriorGuidance(0.03, block=3)
    if term == "deviation":
        return DeviationGuidance(120, 0, last, MEMORY)
    if term in ("clean", "denoiser"):
        return Distance(Reach[term.upper()])
    return ModeGuidance(0.1, 0) if term == "mode" else NoGuidance()


def step(network: str, term: str, batch: int, steps: int, device: str) -> float:
    """Seconds per image and step; a first pass warms up, and does what is done once."""
    keep_freed_memory()
    compute, guidance = Compute(device=device), made(term, steps, device)
    if network in SIZES:
        return _passes(random_dit(network, compute), guidance, batch, steps)
    backbone, digits = DiT(DIGITS, None, image_size=8, compute=compute), Digits(8)
    with tempfile.TemporaryDirectory() as cache:
        work = Work(cache=Path(cache), batch_size=batch, workers=1, flip="none")
        inventory = take_inventory(digits, "train", 1, work.cache, 1)
        fit_part(guidance, digits, lambda: inventory, backbone, work)
        return _passes(backbone, guidance, batch, steps)


def _passes(backbone: DiT | BareDiT, guidance: Guidance, batch: int, steps: int) -> float:
    shape, device = backbone.latent_shape, backbone.device
    keys = [(str(k % 10), k) for k in range(batch)]
    draw = torch.Generator().manual_seed(0)
    earlier = torch.randn(MEMORY, *shape, generator=draw).to(device)
    given = SamplingBatch(
        class_ids=torch.tensor([k % 10 for k in range(batch)], device=device),
        modes=torch.zeros(batch, *shape, device=device),
        images=keys,
        labels=[k % 10 for k in range(batch)],
        finished=lambda row: earlier,
    )
    sampler = DDIM(steps=steps, cfg_scale=4.0, cfg_channels=3)
    seconds: list[float] = []
    while len(seconds) < 4 or sum(seconds) < ENOUGH:
        noise = ImageNoise(0, keys, shape, device, steps - 1)
        start = time.perf_counter()
        sampler(backbone, given, guidance, noise)
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) / batch / steps


def main() -> None:
    """A table of seconds per image and step; the ratio says how much slower a guided one is."""
    device = default_device()
    report = Report("an image's step", "seconds", "x plain", "peak MiB")
    work = {
        "plain": "no term",
        "mode": "reach none: mode",
        "deviation": f"reach none: deviation from {MEMORY} images",
        "clean": "reach clean: a distance",
        "denoiser": "reach denoiser: a distance",
        "prior": "features of block 3: prior, 64 real images",
        "influence": f"reach denoiser: influence, {SNAPSHOTS} snapshots of a ConvNet-3",
    }
    for network, batch, steps, terms in (
        ("dit_digits", 10, 10, TERMS),
        ("DiT-S/2", 4, 4, ("plain", "mode", "clean", "denoiser")),
    ):
        jobs = [(f"{network}: {work[t]}", (step, network, t, batch, steps, device)) for t in terms]
        report.compare(jobs, slower=True)
    report.show()

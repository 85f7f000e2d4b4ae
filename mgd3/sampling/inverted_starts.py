"""Where sampling begins among a class's inverted real latents (D3HR, ICML 2025)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from mgd3.backbones.contract import Backbone
from mgd3.backbones.schedule import SamplingSchedule
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.runtime import checks
from mgd3.runtime.compute import Work
from mgd3.runtime.seeding import stream
from mgd3.runtime.stages import Stage
from mgd3.sampling.inversion import ClassGaussian, Inversion, InvertedClasses
from mgd3.sampling.matched_groups import exact_group, search_group
from mgd3.sampling.terms import SamplingBatch
from mgd3.storage.cache import cached


class InvertedStart:
    """From a group of draws that matches the Gaussian of the class's inverted real latents.

    Real latents are taken to step `level` by DDIM backwards; of a class only mean and deviation of
    each dimension are kept. A class's `ipc` starts are one group of draws from that Gaussian:
    `match` «search» takes the best of `groups` random ones by `group_scores`, «exact» centres and
    rescales one. Candidates of a pool are further groups. A group is a function of the class, the
    seed and the settings alone.

    `offset` 1 decodes it, as the released scripts do, as if it were one step noisier.
    """

    needs_modes = False

    def __init__(
        self,
        level: int,
        offset: int,
        match: str,
        groups: int,
        skew: str,
        skew_weight: float,
        ipc: int,
        steps: int,
        cfg_scale: float,
        cfg_channels: int,
    ) -> None:
        """Raises `UserError` for a value that makes no sense, by its key."""
        self.offset = checks.integer("start.offset", offset, minimum=0, maximum=steps - 1)
        self.match = checks.choice("start.match", match, ["search", "exact"])
        self.groups = checks.integer("start.groups", groups, minimum=1)
        self.skew = checks.choice("start.skew", skew, ["dimension", "sample"])
        self.skew_weight = checks.number("start.skew_weight", skew_weight, minimum=0)
        self.ipc = ipc
        most = steps - 1 - self.offset
        self.inversion = Inversion(
            steps=steps,
            level=checks.integer("start.level", level, minimum=0, maximum=most),
            cfg_scale=cfg_scale,
            cfg_channels=cfg_channels,
        )
        self._classes: dict[str, ClassGaussian] = {}
        self._held: dict[tuple[str, int, int], Tensor] = {}
        self._work: Work | None = None

    def steps(self, num_steps: int) -> int:
        """Those from `level` down, 31 of 50."""
        return self.inversion.level + self.offset + 1

    def fit(
        self,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        backbone: Backbone,
        work: Work,
    ) -> None:
        """Invert the real latents of all classes, unless the cache has them."""
        self._work = work
        self._classes = InvertedClasses(self.inversion, backbone, work).fit(dataset, inventory)

    def stages(
        self,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        backbone: Backbone,
        work: Work,
    ) -> list[Stage]:
        """Encoding and inverting the real images."""
        return InvertedClasses(self.inversion, backbone, work).stages(dataset, inventory)

    def initial(self, schedule: SamplingSchedule, batch: SamplingBatch, noise: Tensor) -> Tensor:
        """Each image's draw of its class's group, (B, C, h, w)."""
        rows = [
            self.group(wnid, k // self.ipc, batch.seed)[k % self.ipc] for wnid, k in batch.images
        ]
        return torch.stack(rows).to(noise)

    def group(self, wnid: str, number: int, seed: int) -> Tensor:
        """A class's starts (ipc, C, h, w); `number` tells a pool's groups apart."""
        if (wnid, number, seed) not in self._held:
            self._held[wnid, number, seed] = self._cached(wnid, number, seed)
        return self._held[wnid, number, seed]

    def _cached(self, wnid: str, number: int, seed: int) -> Tensor:
        """From the cache: a search takes longer than it takes to sample."""
        assert self._work is not None, "fit first"
        of = self._classes[wnid]
        search = [self.groups, self.skew, self.skew_weight] if self.match == "search" else []
        key = {"group": json.dumps([wnid, number, seed, self.ipc, self.match, *search, of.key])}
        digest = hashlib.blake2s(key["group"].encode(), digest_size=8).hexdigest()
        path = self._work.cache / "inversions" / "groups" / f"{wnid}-{digest}.safetensors"
        made: dict[str, Tensor] = cached(
            path, key, lambda: {"group": self._draw(of, stream(seed, wnid, "group", number))}
        )
        return made["group"]

    def _draw(self, of: ClassGaussian, draw: torch.Generator) -> Tensor:
        mean, std = of.mean.flatten(), of.std.flatten()
        if self.match == "exact":
            group = exact_group(mean, std, self.ipc, draw)
        else:
            group = search_group(
                mean, std, self.ipc, self.groups, self.skew, self.skew_weight, draw
            )
        return group.view(self.ipc, *of.mean.shape)

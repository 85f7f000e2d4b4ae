"""How fast this machine is: from what finished runs recorded, else from one batch tried now."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from eval.protocols.recipe import EvalProtocol
from eval.protocols.trial import Step, few, tried
from eval.results.rows import ResultStore
from mgd3.data.claims import OF_SCORES, read_claim
from mgd3.data.distilled import MANIFEST, DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.runtime.machine import machine_name
from mgd3.storage.timing import StageTimes

_ONCE = ("check", "encode", "finetune")  # stages that later runs find done
_PHOTOGRAPH = 1.7  # bytes of a PNG per pixel


@dataclass
class Rates:
    """Rates of one machine, from the runs below `runs`."""

    runs: Path
    device: torch.device
    _steps: dict[tuple, Step] = field(default_factory=dict)

    def training(
        self, student: str, protocol: EvalProtocol, num_classes: int, batch: int
    ) -> tuple[float, int, bool]:
        """Seconds per image and epoch, peak bytes, and whether finished runs say so.

        Tried now, it is one batch of noise, without augmentation, tests or a teacher.
        """
        some = few(batch, self.device)
        step = self._tried(student, protocol.image_size, num_classes, some)
        peak = step.bytes * batch // some
        recorded = self._recorded[1].get((student, protocol.name, protocol.image_size))
        if recorded:
            return statistics.median(recorded), peak, True
        return step.seconds, peak, False

    def distilling(self, method: str, backbone: Mapping[str, Any] | None) -> float | None:
        """Seconds per image, without what is done once for all runs; None: never done here.

        `backbone` is that part of a set's identity.
        """
        found = self._recorded[0].get((method, json.dumps(backbone, sort_keys=True)))
        return statistics.median(found) if found else None

    def image_bytes(self, dataset: str, backbone: Mapping[str, Any]) -> float:
        """Of one PNG: as finished sets of the dataset have, else as photographs do.

        `backbone` is its configuration.
        """
        found = self._recorded[2].get(dataset)
        return statistics.fmean(found) if found else _PHOTOGRAPH * _side(backbone) ** 2

    @cached_property
    def _recorded(self) -> tuple[dict, dict, dict]:
        """Seconds per image by method and backbone; by student and protocol; bytes by dataset."""
        distilling: dict[tuple, list[float]] = defaultdict(list)
        training: dict[tuple, list[float]] = defaultdict(list)
        sizes: dict[str, list[float]] = defaultdict(list)
        here = machine_name(self.device)
        for path in self.runs.rglob(MANIFEST):
            distilled = DistilledDataset(path.parent)
            try:
                manifest = distilled.manifest
            except UserError:
                continue  # nothing to learn from
            count = len(manifest["images"])
            rows = [
                (row, results.parent)
                for results in path.parent.glob("*/results.jsonl")
                for row in ResultStore(results).rows()
                if row.machine == here
            ]
            for row, folder in rows:
                size = _image_size(folder / OF_SCORES)
                spent = (row.train_seconds + row.test_seconds) / (row.epochs * count)
                training[row.student, row.protocol, size].append(spent)
            first = None if manifest.get("elsewhere") else distilled.path(manifest["images"][0])
            if first is not None and first.is_file():
                sizes[manifest["dataset"]].append(first.stat().st_size)
            if manifest.get("machine") == here and manifest.get("identity"):
                backbone = manifest["identity"].get("backbone")
                stages = StageTimes(path.parent / "times.json").read()
                spent = sum(s for stage, s in stages.items() if stage not in _ONCE)
                key = manifest["method"], json.dumps(backbone, sort_keys=True)
                distilling[key].append(spent / count)
        return distilling, training, sizes

    def _tried(self, student: str, size: int, num_classes: int, batch: int) -> Step:
        key = student, size, num_classes, batch
        if key not in self._steps:
            self._steps[key] = tried(*key, self.device)
        return self._steps[key]


def _image_size(claim: Path) -> Any:
    """The size that a folder's students were trained at, as far as it says."""
    try:
        part = read_claim(claim)["identity"].get("protocol")
        return part["values"].get("image_size") if isinstance(part, dict) else None
    except (FileNotFoundError, UserError, KeyError, AttributeError):
        return None


def _side(backbone: Mapping[str, Any]) -> int:
    """Pixels of the images that a backbone's runs write."""
    return int(backbone.get("output_size") or backbone["image_size"])

"""A student on its way through the full real set: what influence guidance compares by (IGD)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.images import TestImages
from eval.metrics.gradients import FittedTrajectory, RealGradients, StudentSnapshot, distinct
from eval.protocols.teachers import FullSetNetwork, FullSetOptions, Place, class_key
from eval.protocols.training import top1
from eval.protocols.trajectory import States, StudentTrajectory
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError
from mgd3.runtime.progress import track
from mgd3.runtime.stages import Stage
from mgd3.storage.cache import cached, found
from mgd3.storage.checkpoints import load_strictly, metadata_json, read_weights

log = logging.getLogger(__name__)

_TESTED = "tested"  # beside the states: how many real test images there are, and top-1 in percent
# of the untrained student and of the last kept one, (3,) float64


class TrajectorySurrogate:
    """Snapshots of a student that is trained on the full real set, once per cache.

    Which ones: `snapshots` by epoch (0 is untrained), or by the rule of `distinct` on the cosine
    of mean real gradients, averaged over the classes. The real gradients of each class lie on disk.
    """

    def __init__(
        self,
        student: str,
        epochs: int,
        lr: float,
        image_size: int,
        seed: int,
        snapshots: Sequence[int] | None,
        threshold: float,
        images: int,
        inputs: str,
        weights: str | None,
        recipe: Mapping[str, Any],
        device: torch.device,
        cache: Path,
        workers: int,
        training_precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        """Raises `UserError` for values out of range, and for a file that is not there."""
        checks.number("surrogate.lr", lr, minimum=0)
        checks.integer("surrogate.image_size", image_size, minimum=4)
        given = {**recipe.get("optimization", {}), "lr": lr}
        self.network = FullSetNetwork(
            FullSetOptions(
                key="surrogate",
                student=student,
                epochs=epochs,
                seed=seed,
                weights=None,
                recipe={**recipe, "image_size": image_size, "optimization": given},
            ),
            Place(device, cache, workers, training_precision, compiled),
        )
        self.lr = lr
        self.epochs = _epochs(snapshots, epochs)
        self.threshold = checks.number("surrogate.threshold", threshold, minimum=-1, maximum=1)
        self.images = checks.integer("surrogate.images", images, minimum=1)
        self.inputs = checks.choice("surrogate.inputs", inputs, ["imagenet", "decoder"])
        self.weights = weights
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"surrogate.weights={weights} does not exist")

    def fit(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> FittedTrajectory:
        """The kept snapshots, trained and chosen on `inventory` now unless the cache has them.

        Raises `UserError` for snapshots of another network, of other classes or of another size,
        and for a student that does no better than chance.
        """
        net = self.network.fresh(dataset).eval().requires_grad_(False)
        gradients = RealGradients(
            inventory, self.images, self.network.image_size, self.network.place
        )
        if self.weights is None:
            kept = self._found_or_chosen(net, gradients, dataset, inventory)
        else:
            kept = self._read(net, Path(self.weights), dataset)
        tested, by_epoch = kept.pop(_TESTED), _by_epoch(kept)
        self._refuse_chance(tested, max(by_epoch), len(dataset.classes))
        snapshots = [self._snapshot(net, state) for state in by_epoch.values()]
        log.info("surrogate: %s after epochs %s", self._student, ", ".join(map(str, by_epoch)))
        fitted = FittedTrajectory(snapshots, gradients)
        labels = range(len(dataset.classes))
        for label in track(labels, "real gradients", len(labels), "classes"):
            fitted.real(label)
        return fitted

    def stages(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> list[Stage]:
        """Training the student and comparing its gradients, as far as the cache has neither."""
        if self.weights is not None:
            return [
                Stage(what=f"reads snapshots from surrogate.weights={self.weights}", there=True)
            ]
        path, key = self._file(dataset, inventory)
        there = found(path, key) is not None
        trained = there or StudentTrajectory(self.network).has(dataset, inventory)
        training = self.network.stage(dataset, inventory)
        compared = f"compares the gradients of {self._student} after each of its epochs"
        return [
            replace(training, there=trained),
            *([] if self.epochs else [Stage(what=compared, there=there)]),
        ]

    @property
    def _student(self) -> str:
        return self.network.options.student

    def _snapshot(self, net: nn.Module, state: Mapping[str, Tensor]) -> StudentSnapshot:
        state = {name: tensor.to(self.network.place.device) for name, tensor in state.items()}
        return StudentSnapshot(net, state, self.network.image_size, self.inputs)

    def _found_or_chosen(
        self,
        net: nn.Module,
        gradients: RealGradients,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
    ) -> dict[str, Tensor]:
        path, key = self._file(dataset, inventory)

        def chosen() -> dict[str, Tensor]:
            states = StudentTrajectory(self.network).states(dataset, inventory)
            epochs = self.epochs or self._choose(net, states, gradients)
            kept = {f"{e}.{name}": t for e in epochs for name, t in states(e).items()}
            return kept | {_TESTED: self._tested(net, [states(0), states(epochs[-1])], dataset)}

        return cached(path, key, chosen)

    def _file(
        self, dataset: RealDataset, inventory: Sequence[ClassImages]
    ) -> tuple[Path, dict[str, str]]:
        """Where the kept snapshots lie, and what they are made from."""
        classes = class_key(dataset)
        network, made_from = self.network.file(classes, inventory)
        rule = self.threshold, self.images, self.inputs
        how = rule if self.epochs is None else self.epochs
        name = hashlib.blake2s(f"{network.stem} {how}".encode(), digest_size=8).hexdigest()
        path = self.network.place.cache / "surrogates" / f"{name}.safetensors"
        return path, {"classes": classes, "made_from": made_from}

    def _choose(self, net: nn.Module, states: States, gradients: RealGradients) -> list[int]:
        """Epochs by the rule."""
        last = self.network.options.epochs
        labels = range(len(gradients.inventory))

        def cosine(kept: int, epoch: int) -> float:
            before, now = (self._snapshot(net, states(e)) for e in (kept, epoch))
            pairs = ((gradients.kept(before, c), gradients.of(now, c)) for c in labels)
            found = [F.cosine_similarity(a, b, dim=0).item() for a, b in pairs]
            return sum(found) / len(found)

        walk = track(range(last + 1), "comparing snapshots", last + 1, "epochs")
        return distinct(walk, cosine, self.threshold)

    def _tested(
        self, net: nn.Module, states: Sequence[Mapping[str, Tensor]], dataset: RealDataset
    ) -> Tensor:
        """The number of real test images, then each state's top-1 in percent."""
        place = self.network.place
        test = TestImages(dataset, place.cache, place.workers)
        pixels, labels = test.on(self.network.image_size, place.device)
        tested = [float(len(labels))]
        for state in states:
            net.load_state_dict(state)
            tested.append(top1(self.network.answers(net, pixels, labels, dataset), labels))
        return torch.tensor(tested, dtype=torch.float64)

    def _refuse_chance(self, tested: Tensor, epoch: int, classes: int) -> None:
        count, untrained, trained = tested.tolist()
        chance = 1 / classes
        noise = (chance * (1 - chance) / count) ** 0.5  # standard error of a guesser
        if trained > max(untrained, 100 * (chance + 2 * noise)):
            return
        raise UserError(
            f"surrogate: {self._student} after epoch {epoch} has top-1 {trained:.1f} % on "
            f"{count:.0f} real test images (untrained {untrained:.1f} %), and chance is "
            f"{100 * chance:.1f} %: its gradients say nothing of the classes; raise "
            f"surrogate.epochs (now {self.network.options.epochs}) or surrogate.lr (now "
            f"{self.lr:g}), or take another surrogate.student"
        )

    def _read(self, net: nn.Module, path: Path, dataset: RealDataset) -> dict[str, Tensor]:
        """A file of kept snapshots that another cache made, for these classes and this size."""
        source = f"surrogate.weights={path}"
        tensors, metadata = read_weights("surrogate.weights", path)
        made_from = metadata_json(metadata, "made_from", list[Any], source)
        classes = metadata_json(metadata, "classes", list[str], source)
        if made_from is None or classes is None or len(tensors.get(_TESTED, ())) != 3:
            raise UserError(f"{source} holds no snapshots; give a file of a cache's surrogates/")
        if classes != json.loads(class_key(dataset)):
            raise UserError(
                f"{source} was trained on {len(classes)} other classes ({_some(classes)}) than "
                f"these {len(dataset.classes)} ({_some([c.wnid for c in dataset.classes])}); give "
                "a file of these in this order, or leave surrogate.weights=null"
            )
        if made_from[2:3] != [self.network.image_size]:
            raise UserError(
                f"{source} was trained on images of {made_from[2]} px; set "
                f"surrogate.image_size={made_from[2]} (now {self.network.image_size})"
            )
        for state in _by_epoch({k: t for k, t in tensors.items() if k != _TESTED}).values():
            load_strictly(net, state, source)
        return dict(tensors)


def _epochs(snapshots: Sequence[int] | None, last: int) -> list[int] | None:
    """The epochs that are asked for, ascending."""
    if snapshots is None:
        return None
    key = "surrogate.snapshots"
    if not isinstance(snapshots, list | tuple) or not snapshots:
        raise UserError(f"{key}={snapshots!r} is no list of epochs such as [0,5,16,40], or null")
    return sorted({checks.integer(key, epoch, minimum=0, maximum=last) for epoch in snapshots})


def _by_epoch(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """State dicts by epoch, ascending."""
    found: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        epoch, _, name = full_name.partition(".")
        found.setdefault(int(epoch), {})[name] = tensor
    return dict(sorted(found.items()))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")

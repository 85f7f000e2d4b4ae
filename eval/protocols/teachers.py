"""Networks trained on the full real set: feature spaces, teachers, upper bounds."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.images import TestImages, held_or_mapped, read_pixels
from eval.protocols.hard_label import HardLabel, every
from eval.protocols.options import check_training_precision
from eval.protocols.recipe import Recipe
from eval.protocols.training import History, StudentTraining
from eval.students.registry import find_student, make_student, network_version
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.runtime import checks
from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.runtime.progress import progress
from mgd3.storage.cache import TENSORS, cached

log = logging.getLogger(__name__)

TORCHVISION = "torchvision"
_NOT_OPTIONS = ("_target_", "version", "reads", "students")  # what a protocol's YAML says besides


@dataclass(frozen=True)
class Place:
    """Where and with what a network is trained."""

    device: torch.device
    cache: Path
    workers: int
    training_precision: str

    def __post_init__(self) -> None:
        check_training_precision(self.training_precision)


@dataclass(frozen=True, kw_only=True)
class FullSetOptions:
    """Which network is trained on the full real set; `key` is the configuration's, for messages.

    `weights` null trains it; a path reads a file that another cache made; «torchvision» takes
    torchvision's ImageNet weights, with the classifier's rows of the dataset's classes. Of
    `recipe` (HardLabel's options) all but the number of epochs is taken.
    """

    key: str
    student: str
    epochs: int
    seed: int
    weights: str | None
    recipe: Mapping[str, Any]

    def __post_init__(self) -> None:
        checks.integer(f"{self.key}.epochs", self.epochs, minimum=1)
        checks.integer(f"{self.key}.seed", self.seed, minimum=0)
        student, weights = self.student, self.weights
        if weights == TORCHVISION and student.startswith("resnet") and not student.endswith("_bn"):
            raise UserError(
                f"{self.key}.weights=torchvision is a network with batch norm; set "
                f"{self.key}.student={student}_bn"
            )
        if weights not in (None, TORCHVISION) and not Path(weights).is_file():
            raise UserError(f"{self.key}.weights={weights} does not exist")


class FullSetNetwork:
    """A student trained by the hard-label recipe on every training image, once per cache."""

    def __init__(self, options: FullSetOptions, place: Place) -> None:
        self.options, self.place = options, place
        recipe = {k: v for k, v in options.recipe.items() if k not in _NOT_OPTIONS}
        self.protocol = HardLabel(**recipe, training_precision=place.training_precision)
        self.image_size = self.protocol.image_size
        find_student(options.student, self.image_size)

    def network(
        self, dataset: RealDataset, inventory: Sequence[ClassImages] | None = None
    ) -> nn.Module:
        """The network in eval mode, trained on `inventory` now unless the cache has it.

        None takes the inventory of all training images. Raises `UserError` for weights of another
        network or of other classes.
        """
        own, place = self.options, self.place
        if own.weights == TORCHVISION:
            return self._torchvision(dataset)
        if inventory is None:
            inventory = take_inventory(dataset, "train", 1, place.cache, place.workers)
        net = make_student(own.student, len(inventory), self.image_size, own.seed).to(place.device)
        classes = json.dumps([c.wnid for c in dataset.classes])
        if own.weights:
            self._read(net, Path(own.weights), classes)
        else:
            self._find_or_train(net, classes, dataset, inventory)
        return net.eval()

    def _read(self, net: nn.Module, path: Path, classes: str) -> None:
        """Weights that the user gives."""
        own = self.options
        try:
            net.load_state_dict(TENSORS.read(path, {"classes": classes}))
        except (CorruptFileError, RuntimeError) as error:
            raise UserError(
                f"{path} is not a {own.student} of these {len(json.loads(classes))} classes "
                f"({str(error).splitlines()[0]}); give a file that scripts/train_teacher.py or a "
                "run's cache holds"
            ) from error
        log.info("%s: %s", own.student, path)

    def _find_or_train(
        self,
        net: nn.Module,
        classes: str,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
    ) -> None:
        own, recipe = self.options, self._recipe(inventory)
        how = asdict(recipe), asdict(self.protocol.augmentation)
        version = network_version(own.student, self.image_size)
        apart = [version] if version > 1 else []  # the first one's files keep their names
        made_from = json.dumps([own.student, own.seed, self.image_size, *how, *apart])
        digests = [digest for found in inventory for digest in found.digests]
        text = "\n".join([classes, made_from, *digests])
        name = hashlib.blake2s(text.encode(), digest_size=8).hexdigest()
        path = self.place.cache / "students" / f"{name}.safetensors"
        checkpoint = path.with_suffix(".part")

        def trained() -> dict[str, Tensor]:
            self._train(net, recipe, checkpoint, dataset, inventory)
            return net.state_dict()

        net.load_state_dict(cached(path, {"classes": classes, "made_from": made_from}, trained))
        if checkpoint.is_file():  # only now: the network is on disk
            checkpoint.unlink(missing_ok=True)
        log.info("%s: %s", own.student, path)

    def _recipe(self, inventory: Sequence[ClassImages]) -> Recipe:
        epochs, images = self.options.epochs, sum(len(found.images) for found in inventory)
        return replace(
            self.protocol.recipe(images, len(inventory), self.options.student),
            epochs=epochs,
            schedule=self.protocol.optimization.schedule(epochs),
            tests=every(max(1, epochs // 10), epochs),
        )

    def _train(
        self,
        net: nn.Module,
        recipe: Recipe,
        checkpoint: Path,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
    ) -> None:
        own, place, size = self.options, self.place, self.image_size
        images = [(i, label) for label, found in enumerate(inventory) for i in found.images]
        pixels = held_or_mapped(
            read_pixels([i for i, _ in images], size, place.workers),
            (len(images), 3, size, size),
            [digest for found in inventory for digest in found.digests],
            place.device,
            place.cache,
        )
        labels = torch.tensor([label for _, label in images], device=place.device)
        objective = self.protocol.objective(pixels)
        training = StudentTraining(net, recipe, objective, own.seed, checkpoint)
        test = TestImages(dataset, place.cache, place.workers).on(size, place.device)
        what = f"training {own.student} on {len(labels)} real images, epochs"
        with progress(what, recipe.epochs) as advance:
            advance(training.epoch)

            def on_epoch(history: History) -> None:
                note = f"top-1 {history.top1_last:.1f} %" if history.tested else ""
                advance(1, note=note)

            training.fit(pixels, labels, test, on_epoch)

    def _torchvision(self, dataset: RealDataset) -> nn.Module:
        """torchvision's ImageNet network, its classifier cut to the dataset's classes."""
        from torchvision.models import get_model

        key, student = self.options.key, self.options.student
        rows = [c.imagenet_id for c in dataset.classes]
        if None in rows:
            raise UserError(
                f"{key}.weights=torchvision knows ImageNet's classes only, and "
                f"dataset={dataset.name} has others; set {key}.weights=null to train one"
            )
        try:
            net = get_model(student.removesuffix("_bn"), weights="IMAGENET1K_V1")
        except (ValueError, OSError) as error:
            raise UserError(
                f"{key}: torchvision's weights of {student} cannot be had ({error})"
            ) from error
        *_, (name, last) = ((n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear))
        cut = nn.Linear(last.in_features, len(rows))
        cut.weight.data, cut.bias.data = last.weight.data[rows], last.bias.data[rows]
        net.set_submodule(name, cut)
        return net.to(self.place.device).eval()

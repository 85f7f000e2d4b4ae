"""Networks trained on the full real set: feature spaces, teachers, upper bounds."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eval.images import TestImages, read_pixels
from eval.pixel_files import held_or_mapped
from eval.protocols.answers import Answers
from eval.protocols.hard_label import HardLabel, every
from eval.protocols.observers import (
    TORCHVISION,
    load_observer,
    origin,
    published_words,
    refuse_other_orders,
    torchvision_tensors,
)
from eval.protocols.recipe import Recipe
from eval.protocols.training import History, StudentTraining, predicted
from eval.protocols.trial import TrainingCost
from eval.students.registry import find_student, make_student, network_version
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.runtime import checks
from mgd3.runtime.compute import check_training_precision
from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.runtime.progress import progress
from mgd3.runtime.stages import Stage, announce
from mgd3.storage.cache import TENSORS, cached
from mgd3.storage.checkpoints import metadata_json, read_weights

log = logging.getLogger(__name__)

# What a protocol's YAML says besides
_NOT_OPTIONS = ("_target_", "version", "family", "reads", "students")


@dataclass(frozen=True)
class Place:
    """Where and with what a network is trained."""

    only_how: ClassVar[bool] = True  # as a setting of another part it does not count

    device: torch.device
    cache: Path
    workers: int
    training_precision: str
    compiled: bool = False  # by torch.compile: a minute at first, faster afterwards

    def __post_init__(self) -> None:
        check_training_precision(self.training_precision)


@dataclass(frozen=True, kw_only=True)
class FullSetOptions:
    """Which network is trained on the full real set; `key` is the configuration's, for messages.

    `weights` null trains it; a path reads a file that another cache made, or an observer's
    (observers.py); «torchvision» takes torchvision's ImageNet weights, with the classifier's rows
    of the dataset's classes. Of `recipe` (HardLabel's options) all but the number of epochs is
    taken.
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

    @property
    def place_of_weights(self) -> str:
        """The key and its value, for messages."""
        return f"{self.key}.weights={self.weights}"


class FullSetNetwork:
    """A student trained by the hard-label recipe on every training image, once per cache."""

    def __init__(self, options: FullSetOptions, place: Place) -> None:
        self.options, self.place = options, place
        recipe = {k: v for k, v in options.recipe.items() if k not in _NOT_OPTIONS}
        known = signature(HardLabel).parameters.keys() - {"training_precision"}
        for key in recipe:
            checks.choice(f"a key of {options.key}.recipe", key, sorted(known))
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
        net = self.fresh(dataset)
        if own.weights is not None:
            self._read(net, own.weights, dataset)
            log.info("%s: %s", own.student, own.weights)
            return net.eval()
        if inventory is None:
            inventory = take_inventory(dataset, "train", 1, place.cache, place.workers)
        self._find_or_train(net, class_key(dataset), dataset, inventory)
        return net.eval()

    def fresh(self, dataset: RealDataset) -> nn.Module:
        """The network of these classes, untrained."""
        own, classes = self.options, len(dataset.classes)
        return make_student(own.student, classes, self.image_size, own.seed).to(self.place.device)

    def answers(
        self, net: nn.Module, pixels: Tensor, labels: Tensor, dataset: RealDataset
    ) -> Tensor:
        """Labels (N,) that the network finds for real test images.

        Pixels (N, 3, H, W) uint8, already cropped, and their labels (N,). Raises `UserError` for
        weights that the user gives and whose rows are in another order.
        """
        found = predicted(Answers(net, self.place.training_precision), pixels)
        if self.options.weights is not None:
            refuse_other_orders(found, labels, dataset, self.options.place_of_weights)
        return found

    def refuse_below(self, right: float, minimum: float, dataset: RealDataset) -> None:
        """`UserError` for a network that is `right` on fewer percent of the real test images."""
        own = self.options
        if right >= minimum:
            return
        published = "" if own.weights is None else published_words(dataset, own.student)
        raise UserError(
            f"{own.key}: {own.student} ({origin(own.weights)}) is right on {right:.1f} % of the "
            f"real test images of dataset={dataset.name}, less than {own.key}.minimum_top1="
            f"{minimum:g} (chance is {100 / len(dataset.classes):g} %{published}): wrong classes, "
            "wrong class order or too short a training"
        )

    def _read(self, net: nn.Module, weights: str, dataset: RealDataset) -> None:
        """Weights that the user gives: ours, another's file, torchvision's."""
        own, key = self.options, self.options.place_of_weights
        if weights == TORCHVISION:
            tensors = torchvision_tensors(key, own.student, dataset)
        else:
            tensors, metadata = read_weights(f"{own.key}.weights", Path(weights))
            if "classes" in metadata:
                return self._read_ours(net, Path(weights), metadata, dataset)
        load_observer(net, tensors, dataset, key, own.student)

    def _read_ours(
        self, net: nn.Module, path: Path, metadata: Mapping[str, str], dataset: RealDataset
    ) -> None:
        """A file that `network` has written, for these classes and images of this size."""
        own, classes = self.options, class_key(dataset)
        made_from = metadata_json(metadata, "made_from", list[Any], str(path)) or []
        if made_from[2:3] not in ([], [self.image_size]):
            raise UserError(
                f"{path} was trained on images of {made_from[2]} px, and these have "
                f"{self.image_size}; give a file of this size"
            )
        try:
            net.load_state_dict(TENSORS.read(path, {"classes": classes}))
        except (CorruptFileError, RuntimeError) as error:
            raise UserError(
                f"{path} is not a {own.student} of these {len(json.loads(classes))} classes "
                f"({str(error).splitlines()[0]}); give a file that scripts/train_teacher.py or a "
                "run's cache holds"
            ) from error

    def _find_or_train(
        self,
        net: nn.Module,
        classes: str,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
    ) -> None:
        path, made_from = self.file(classes, inventory)
        checkpoint = path.with_suffix(".part")

        def trained() -> dict[str, Tensor]:
            self.train(net, checkpoint, dataset, inventory)
            return net.state_dict()

        net.load_state_dict(cached(path, {"classes": classes, "made_from": made_from}, trained))
        if checkpoint.is_file():  # only now: the network is on disk
            checkpoint.unlink(missing_ok=True)
        log.info("%s: %s", self.options.student, path)

    def file(self, classes: str, inventory: Sequence[ClassImages]) -> tuple[Path, str]:
        """Where the network of these classes and images lies in the cache; what it is made from."""
        own = self.options
        how = asdict(self._recipe(inventory)), asdict(self.protocol.augmentation)
        version = network_version(own.student, self.image_size)
        apart = [version] if version > 1 else []  # the first one's files keep their names
        made_from = json.dumps([own.student, own.seed, self.image_size, *how, *apart])
        digests = [digest for found in inventory for digest in found.digests]
        text = "\n".join([classes, made_from, *digests])
        name = hashlib.blake2s(text.encode(), digest_size=8).hexdigest()
        return self.place.cache / "students" / f"{name}.safetensors", made_from

    def stage(self, dataset: RealDataset, inventory: Sequence[ClassImages]) -> Stage:
        """Training the network on `inventory`, where neither a file nor the cache has it."""
        own = self.options
        if own.weights is not None:
            return Stage(what=f"reads {own.student} from {own.place_of_weights}", there=True)
        path, _ = self.file(class_key(dataset), inventory)
        images = sum(len(found.images) for found in inventory)
        what = f"trains {own.student} on {images:,} real images for {own.epochs:,} epochs"
        if path.is_file():
            return Stage(what=what, there=True)
        seconds, guess = self._cost(inventory).seconds(own.epochs)
        shorter = f"{own.key}.epochs=… or {own.key}.student=…"
        return Stage(what=what, seconds=seconds, guess=guess, shorter=shorter)

    def _cost(self, inventory: Sequence[ClassImages]) -> TrainingCost:
        return TrainingCost(
            student=self.options.student,
            protocol=self.protocol,
            recipe=self._recipe(inventory),
            images=sum(len(found.images) for found in inventory),
            num_classes=len(inventory),
            cache=self.place.cache,
            device=self.place.device,
            compiled=self.place.compiled,
        )

    def _recipe(self, inventory: Sequence[ClassImages]) -> Recipe:
        epochs, images = self.options.epochs, sum(len(found.images) for found in inventory)
        return replace(
            self.protocol.recipe(images, len(inventory), self.options.student),
            epochs=epochs,
            schedule=self.protocol.optimization.schedule(epochs),
            tests=every(max(1, epochs // 10), epochs),
        )

    def train(
        self,
        net: nn.Module,
        checkpoint: Path,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
        after_epoch: Callable[[int], None] = lambda epoch: None,
    ) -> None:
        """Train `net`, or go on from `checkpoint`; `after_epoch` is told how many are finished."""
        own, place, size = self.options, self.place, self.image_size
        recipe = self._recipe(inventory)
        stage, cost = self.stage(dataset, inventory), self._cost(inventory)
        announce(stage)
        images = [(i, label) for label, found in enumerate(inventory) for i in found.images]
        pixels = held_or_mapped(
            read_pixels([i for i, _ in images], size, place.workers),
            (len(images), 3, size, size),
            [str(size), *(digest for found in inventory for digest in found.digests)],
            place.device,
            place.cache,
            "training",
        )
        labels = torch.tensor([label for _, label in images], device=place.device)
        objective = self.protocol.objective(pixels)
        training = StudentTraining(net, recipe, objective, own.seed, checkpoint, place.compiled)
        test = TestImages(dataset, place.cache, place.workers).on(size, place.device)
        what = f"training {own.student} on {len(labels):,} real images"
        done, compiles = training.epoch, place.compiled
        with progress(
            what, recipe.epochs, "epochs", done, stage, cost.pace, compiles=compiles
        ) as advance:

            def on_epoch(history: History) -> None:
                note = f"top-1 {history.top1_last:.1f} %" if history.tested else ""
                advance(1, note=note)
                after_epoch(training.epoch)

            training.fit(pixels, labels, test, on_epoch)


def class_key(dataset: RealDataset) -> str:
    """The classes in their order, as files keep them."""
    return json.dumps([c.wnid for c in dataset.classes])

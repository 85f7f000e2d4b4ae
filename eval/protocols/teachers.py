"""Networks trained on the full real set: feature spaces, teachers, upper bounds."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eval.images import TestImages, held_or_mapped, read_pixels
from eval.protocols.hard_label import HardLabel, every
from eval.protocols.training import History, Recipe, StudentTraining
from eval.students.registry import find_student, make_student
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.runtime import checks
from mgd3.runtime.errors import CorruptFileError, UserError
from mgd3.runtime.files import waiting
from mgd3.runtime.progress import progress
from mgd3.runtime.tensors import load_tensors, save_tensors

log = logging.getLogger(__name__)

TORCHVISION = "torchvision"


class FullSetNetwork:
    """A student trained by the hard-label recipe on every training image, once per cache.

    `weights` null trains it; a path reads a file that another cache made; «torchvision» takes
    torchvision's ImageNet weights, with the classifier's rows of the dataset's classes.
    """

    def __init__(
        self,
        key: str,
        student: str,
        epochs: int,
        seed: int,
        weights: str | None,
        recipe: Mapping[str, Any],
        device: torch.device,
        cache: Path,
        workers: int,
    ) -> None:
        """`key` is the configuration's, for messages; of `recipe` (HardLabel's options) all but
        the number of epochs is taken.
        """
        self.protocol = HardLabel(**{k: v for k, v in recipe.items() if k != "_target_"})
        self.image_size = self.protocol.image_size
        find_student(student, self.image_size)
        self.key, self.student = key, student
        self.epochs = checks.integer(f"{key}.epochs", epochs, minimum=1)
        self.seed = checks.integer(f"{key}.seed", seed, minimum=0)
        self.weights = weights
        self.device, self.cache, self.workers = device, cache, workers

        if weights == TORCHVISION and student.startswith("resnet") and not student.endswith("_bn"):
            raise UserError(
                f"{key}.weights=torchvision is a network with batch norm; set "
                f"{key}.student={student}_bn"
            )
        if weights not in (None, TORCHVISION) and not Path(weights).is_file():
            raise UserError(f"{key}.weights={weights} does not exist")

    def network(
        self, dataset: RealDataset, inventory: Sequence[ClassImages] | None = None
    ) -> nn.Module:
        """The network in eval mode, trained on `inventory` now unless the cache has it.

        None takes the inventory of all training images. Raises `UserError` for weights of another
        network or of other classes.
        """
        if self.weights == TORCHVISION:
            return self._torchvision(dataset)
        if inventory is None:
            inventory = take_inventory(dataset, "train", 1, self.cache, self.workers)
        net = make_student(self.student, len(inventory), self.image_size, self.seed)
        net = net.to(self.device)
        recipe = replace(
            self.protocol.recipe(
                sum(len(i.images) for i in inventory), len(inventory), self.student
            ),
            epochs=self.epochs,
            schedule=self.protocol.schedule(self.epochs),
            tests=every(max(1, self.epochs // 10), self.epochs),
        )
        classes = json.dumps([c.wnid for c in dataset.classes])
        made_from = json.dumps(
            [
                *(self.student, self.seed, self.image_size, self.protocol.cutmix),
                *(asdict(recipe), asdict(self.protocol.augmentation)),
            ]
        )
        digests = [digest for found in inventory for digest in found.digests]
        key = hashlib.blake2s("\n".join([made_from, *digests]).encode(), digest_size=8).hexdigest()
        path = Path(self.weights) if self.weights else self.cache / f"students/{key}.safetensors"
        with waiting(path.parent):
            try:
                net.load_state_dict(load_tensors(path, {"classes": classes}))
            except (CorruptFileError, RuntimeError) as error:
                remedy = (
                    "give a file that scripts/train_teacher.py or a run's cache holds"
                    if self.weights
                    else "delete it, and the same command makes it again"
                )
                raise UserError(
                    f"{path} is not a {self.student} of these {len(inventory)} classes "
                    f"({str(error).splitlines()[0]}); {remedy}"
                ) from error
            except FileNotFoundError:
                self._train(net, recipe, path.with_suffix(".part"), dataset, inventory)
                metadata = {"classes": classes, "made_from": made_from}
                save_tensors(path, net.state_dict(), metadata)
                path.with_suffix(".part").unlink(missing_ok=True)
        log.info("%s: %s", self.student, path)
        return net.eval()

    def _train(
        self,
        net: nn.Module,
        recipe: Recipe,
        checkpoint: Path,
        dataset: RealDataset,
        inventory: Sequence[ClassImages],
    ) -> None:
        images = [(i, label) for label, found in enumerate(inventory) for i in found.images]
        pixels = held_or_mapped(
            read_pixels([i for i, _ in images], self.image_size, self.workers),
            (len(images), 3, self.image_size, self.image_size),
            [digest for found in inventory for digest in found.digests],
            self.device,
            self.cache,
        )
        labels = torch.tensor([label for _, label in images], device=self.device)
        training = StudentTraining(
            net, recipe, self.protocol.objective(pixels), self.seed, checkpoint
        )
        test = TestImages(dataset, self.cache, self.workers).on(self.image_size, self.device)
        what = f"training {self.student} on {len(labels)} real images, epochs"
        with progress(what, self.epochs) as advance:
            advance(training.epoch)

            def on_epoch(history: History) -> None:
                note = f"top-1 {history.top1_last:.1f} %" if history.tested else ""
                advance(1, note=note)

            training.fit(pixels, labels, test, on_epoch)

    def _torchvision(self, dataset: RealDataset) -> nn.Module:
        """torchvision's ImageNet network, its classifier cut to the dataset's classes."""
        from torchvision.models import get_model

        rows = [c.imagenet_id for c in dataset.classes]
        if None in rows:
            raise UserError(
                f"{self.key}.weights=torchvision knows ImageNet's classes only, and "
                f"dataset={dataset.name} has others; set {self.key}.weights=null to train one"
            )
        try:
            net = get_model(self.student.removesuffix("_bn"), weights="IMAGENET1K_V1")
        except (ValueError, OSError) as error:
            raise UserError(
                f"{self.key}: torchvision's weights of {self.student} cannot be had ({error})"
            ) from error
        *_, (name, last) = ((n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear))
        cut = nn.Linear(last.in_features, len(rows))
        cut.weight.data, cut.bias.data = last.weight.data[rows], last.bias.data[rows]
        net.set_submodule(name, cut)
        return net.to(self.device).eval()

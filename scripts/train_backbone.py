"""Train a small DiT on any dataset; a killed training goes on from its last checkpoint."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
import torch
from omegaconf import DictConfig
from safetensors import safe_open
from torch import Tensor

from eval.metrics.teaching import lesson
from eval.reports.drawings.pictures import sheet
from eval.students.registry import find_student
from mgd3.backbones.codecs import make_codec
from mgd3.backbones.contract import Codec
from mgd3.backbones.dit import BareDiT
from mgd3.backbones.weights.dit_weights import build_network, constructor_arguments, to_original
from mgd3.config.build import build, build_protocol
from mgd3.config.run_folder import begun, record
from mgd3.config.schema import CONFIGS, plain
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import ClassImages, take_inventory
from mgd3.data.pixels import to_pixels
from mgd3.finetuning.from_scratch import Trainer, TrainSettings
from mgd3.finetuning.loss_curves import loss_curve
from mgd3.modes.latents import LatentCache
from mgd3.runtime import checks
from mgd3.runtime.compute import Compiled, Compute
from mgd3.runtime.errors import UserError, reading
from mgd3.runtime.progress import progress
from mgd3.sampling.guidance import NoGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDPM
from mgd3.sampling.terms import SamplingBatch
from mgd3.storage.files import exclusive, remove_leftovers, write_atomic, write_json
from mgd3.storage.tensors import tensor_bytes, tensors_digest

log = logging.getLogger(__name__)

_NETWORK = ("patch_size", "hidden_size", "depth")
_SHOWN, _PER_CLASS = 10, 8  # classes on the sheet of samples, and images of each


def encode(
    dataset: RealDataset, inventory: Sequence[ClassImages], codec: Codec, cfg: DictConfig
) -> tuple[Tensor, Tensor]:
    """All training latents (N, C, h, w) and their labels (N,), mirror images after the others."""
    latents, labels = [], []
    for flip in ["none", "all"] if cfg.train.mirror else ["none"]:
        cache = LatentCache(Path(cfg.cache) / "latents", codec, flip, cfg.compute.workers)
        classes = list(zip(dataset.classes, inventory, strict=True))
        with cache.encoding(classes):
            for label, (info, images) in enumerate(classes):
                latents.append(cache.latents(info, images))
                labels += [label] * len(latents[-1])
    return torch.cat(latents), torch.tensor(labels)


def samples(trainer: Trainer, codec: Codec, wnids: list[str], compute: Compute) -> Tensor:
    """Eight images of the first ten classes at the paper's settings, (N, 3, H, W) in [-1, 1]."""
    images = [(wnid, index) for wnid in wnids[:_SHOWN] for index in range(_PER_CLASS)]
    labels = torch.tensor([wnids.index(wnid) for wnid, _ in images], device=compute.torch_device)
    backbone = BareDiT(trainer.network, compute)
    modes = torch.zeros(len(images), *backbone.latent_shape, device=compute.torch_device)
    sampler = DDPM(steps=50, cfg_scale=4.0, cfg_channels=3)
    with progress(f"sampling {len(images)} images", sampler.steps, "steps") as advance:
        latents = sampler(
            backbone,
            SamplingBatch(class_ids=labels, modes=modes),
            NoGuidance(),
            ImageNoise(0, images, backbone.latent_shape),
            on_step=lambda state: advance(),
        )
    return codec.decode(latents)


def _options(cfg: DictConfig) -> tuple[TrainSettings, dict[str, Any]]:
    """How to train, and what network."""
    options = plain(cfg.train)
    of_training = [f.name for f in fields(TrainSettings) if f.name != "precision"]
    for option in options:
        known = [*_NETWORK, "mirror", "stored_as", *of_training]
        checks.choice("an option of train", option, known)
    architecture = {k: options.pop(k) for k in _NETWORK}
    mirror, stored_as = options.pop("mirror"), options.pop("stored_as")
    checks.flag("train.mirror", mirror)
    checks.choice("train.stored_as", stored_as, ["float32", "float16"])
    settings = TrainSettings(**options, precision=cfg.compute.training_precision)
    return settings, architecture


def _refuse_another_file(out: Path, training: dict[str, Any], wnids: list[str]) -> None:
    """`UserError` for a file that this very training has not written: it would be lost."""
    if not out.exists():
        return
    with reading(out, "choose another backbone.weights"), safe_open(out, framework="pt") as file:
        metadata = file.metadata() or {}
        made_by = json.loads(metadata.get("training", "{}"))
        same = json.loads(metadata.get("classes", "[]")) == wnids
    made_by.pop("step", None)
    if not same or made_by != training:
        raise UserError(
            f"backbone.weights={out} exists and comes from elsewhere or from a training with other "
            "values: it is not overwritten; choose another name, or move it away"
        )


class _Exports:
    """What a training leaves beside its checkpoint: weights, pictures, a judgement of samples."""

    def __init__(
        self, cfg: DictConfig, out: Path, codec: Codec, wnids: list[str], training: dict[str, Any]
    ) -> None:
        self.cfg, self.out, self.codec, self.wnids, self.training = cfg, out, codec, wnids, training
        self.aside = out.with_suffix(".training")
        self.compute = Compute(device=cfg.compute.device)
        self._drawn: tuple[int, Tensor] | None = None  # the last step's samples

    def weights(self, trainer: Trainer) -> None:
        """The averaged weights, as `backbone.weights` takes them."""
        metadata = {
            "config": constructor_arguments(trainer.network),
            "classes": json.dumps(self.wnids),
            "training": json.dumps({**self.training, "step": trainer.step}),
        }
        kind = getattr(torch, self.cfg.train.stored_as)
        tensors = {k: v.to(kind) for k, v in to_original(trainer.network).items()}
        write_atomic(self.out, tensor_bytes(tensors, metadata))

    def pictures(self, trainer: Trainer) -> Tensor:
        """Samples as a sheet and the course of the loss; the samples' pixels (N, 3, H, W) uint8."""
        images = samples(trainer, self.codec, self.wnids, self.compute)
        write_atomic(self.aside / "samples.png", sheet(images, columns=_PER_CLASS))
        write_atomic(self.aside / "loss.png", loss_curve(trainer.losses))
        log.info("samples after step %d: %s", trainer.step, self.aside / "samples.png")
        self._drawn = trainer.step, to_pixels(images)
        return self._drawn[1]

    def judgement(
        self, trainer: Trainer, dataset: RealDataset, inventory: Sequence[ClassImages]
    ) -> None:
        """At the end: do samples teach what random real images do?"""
        cfg, path = self.cfg, self.aside / f"judgement-{trainer.step}.json"
        if cfg.judge is None or path.is_file():
            return
        unseen = take_inventory(dataset, "val", 1, Path(cfg.cache), cfg.compute.workers)
        if self._drawn is not None and self._drawn[0] == trainer.step:
            pixels = self._drawn[1]
        else:  # the training ended before, and its judgement did not come
            with trainer.state.averaged():
                pixels = self.pictures(trainer)
        images, tests = ([found.images for found in of[:_SHOWN]] for of in (inventory, unseen))
        by_class = pixels.unflatten(0, (len(images), _PER_CLASS))
        protocol, device = build_protocol(cfg), self.compute.torch_device
        found = lesson(by_class, images, tests, protocol, cfg.judge, device)
        write_json(path, asdict(found))
        longer = f", train.steps={2 * trainer.step} with another backbone.weights"
        said = found.sentence() + (longer if found.worse else "")
        log.info("after %d steps %s", trainer.step, said)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train_backbone")
def main(cfg: DictConfig) -> None:
    """Encode the images, train, and write the averaged weights where `backbone.weights` says."""
    with begun(cfg) as folder:
        out = Path(str(cfg.backbone.weights)).expanduser()
        checks.choice("the suffix of backbone.weights", out.suffix, [".safetensors"])
        settings, architecture = _options(cfg)
        if cfg.judge is not None:
            find_student(cfg.judge, cfg.protocol.image_size)
        dataset = build(cfg, "dataset")
        compute = Compute(
            device=cfg.compute.device,
            encoding_precision=cfg.compute.encoding_precision,
        )
        compiled = Compiled.of(cfg.compute.compile).training
        codec = make_codec(
            cfg.backbone.vae, cfg.backbone.image_size, cfg.backbone.get("latents", "mean"), compute
        )
        wnids = [c.wnid for c in dataset.classes]
        training = {**plain(cfg.train), "dataset": dataset.name}
        _refuse_another_file(out, training, wnids)
    record(folder, cfg)
    exports = _Exports(cfg, out, codec, wnids, training)
    remove_leftovers(out.parent, deep=False)
    remove_leftovers(exports.aside)
    inventory = take_inventory(dataset, "train", 1, Path(cfg.cache), cfg.compute.workers)
    latents, labels = encode(dataset, inventory, codec, cfg)
    latents, labels = latents.to(compute.torch_device), labels.to(compute.torch_device)
    torch.manual_seed(settings.seed)
    network = build_network(
        input_size=latents.shape[-1],
        in_channels=latents.shape[1],
        num_heads=cfg.backbone.num_heads,
        num_classes=len(dataset.classes),
        **architecture,
    ).to(compute.torch_device)
    data = tensors_digest({"latents": latents, "labels": labels})
    with exclusive(exports.aside):
        checkpoint = exports.aside / "checkpoint.safetensors"
        trainer = Trainer(network, settings, checkpoint, data, compiled=compiled)
        trainer.train(latents, labels, exports.weights, exports.pictures)
        exports.judgement(trainer, dataset, inventory)
    log.info("weights: %s; samples and loss curve: %s", out, exports.aside)


if __name__ == "__main__":
    command(main)

"""Train a small DiT on any dataset; a killed training goes on from its last checkpoint."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

import hydra
import torch
from omegaconf import DictConfig
from safetensors import safe_open
from torch import Tensor

from eval.reports.pictures import sheet
from mgd3.backbones.codecs import make_codec
from mgd3.backbones.contract import Codec
from mgd3.backbones.dit import BareDiT
from mgd3.backbones.weights.dit_weights import build_network, constructor_arguments, to_original
from mgd3.config.build import build
from mgd3.config.command import command
from mgd3.config.run_folder import begun, record
from mgd3.config.schema import CONFIGS, plain
from mgd3.data.datasets import RealDataset
from mgd3.data.inventory import take_inventory
from mgd3.finetuning.from_scratch import Trainer, TrainSettings
from mgd3.finetuning.loss_curves import loss_curve
from mgd3.modes.latents import LatentCache
from mgd3.runtime import checks
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError, reading
from mgd3.sampling.guidance import NoGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDPM
from mgd3.sampling.terms import SamplingBatch
from mgd3.storage.files import exclusive, remove_leftovers, write_atomic
from mgd3.storage.tensors import tensor_bytes, tensors_digest

log = logging.getLogger(__name__)

_NETWORK = ("patch_size", "hidden_size", "depth")


def encode(
    dataset: RealDataset, codec: Codec, cfg: DictConfig, flips: list[str]
) -> tuple[Tensor, Tensor]:
    """All training latents (N, C, h, w) and their labels (N,)."""
    inventory = take_inventory(dataset, "train", 1, Path(cfg.cache), cfg.compute.workers)
    latents, labels = [], []
    for flip in flips:
        cache = LatentCache(Path(cfg.cache) / "latents", codec, flip)
        for label, images in enumerate(inventory):
            latents.append(cache.latents(dataset.classes[label], images))
            labels += [label] * len(latents[-1])
    return torch.cat(latents), torch.tensor(labels)


def samples(trainer: Trainer, codec: Codec, wnids: list[str], compute: Compute) -> Tensor:
    """Eight images per class at the paper's settings, (8 * classes, 3, H, W)."""
    images = [(wnid, index) for wnid in wnids[:10] for index in range(8)]
    labels = torch.tensor([wnids.index(wnid) for wnid, _ in images], device=compute.torch_device)
    backbone = BareDiT(trainer.network, compute)
    latents = DDPM(steps=50, cfg_scale=4.0, cfg_channels=3)(
        backbone,
        SamplingBatch(
            class_ids=labels,
            modes=torch.zeros(len(images), *backbone.latent_shape, device=compute.torch_device),
        ),
        NoGuidance(),
        ImageNoise(0, images, backbone.latent_shape),
    )
    return codec.decode(latents)


def _options(cfg: DictConfig) -> tuple[TrainSettings, dict[str, Any], list[str]]:
    """How to train, what network, and which mirrorings of the images."""
    options = plain(cfg.train)
    of_training = [f.name for f in fields(TrainSettings) if f.name != "precision"]
    for option in options:
        known = [*_NETWORK, "mirror", "stored_as", *of_training]
        checks.choice("an option of train", option, known)
    architecture = {k: options.pop(k) for k in _NETWORK}
    mirror, stored_as = options.pop("mirror"), options.pop("stored_as")
    checks.choice("train.stored_as", stored_as, ["float32", "float16"])
    settings = TrainSettings(**options, precision=cfg.compute.training_precision)
    return settings, architecture, ["none", "all"] if mirror else ["none"]


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


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train_backbone")
def main(cfg: DictConfig) -> None:
    """Encode the images, train, and write the averaged weights where `backbone.weights` says."""
    with begun(cfg) as folder:
        out = Path(str(cfg.backbone.weights)).expanduser()
        checks.choice("the suffix of backbone.weights", out.suffix, [".safetensors"])
        settings, architecture, flips = _options(cfg)
        compute = Compute(device=cfg.compute.device)
        dataset = build(cfg, "dataset")
        codec = make_codec(
            cfg.backbone.vae, cfg.backbone.image_size, cfg.backbone.get("latents", "mean"), compute
        )
        wnids = [c.wnid for c in dataset.classes]
        training = {**plain(cfg.train), "dataset": dataset.name}
        _refuse_another_file(out, training, wnids)
    record(folder, cfg)
    remove_leftovers(out.parent, deep=False)
    remove_leftovers(out.with_suffix(".training"))
    device = compute.torch_device
    latents, labels = encode(dataset, codec, cfg, flips)
    latents, labels = latents.to(device), labels.to(device)

    torch.manual_seed(settings.seed)
    network = build_network(
        input_size=latents.shape[-1],
        in_channels=latents.shape[1],
        num_heads=cfg.backbone.num_heads,
        num_classes=len(dataset.classes),
        **architecture,
    ).to(device)
    aside = out.with_suffix(".training")

    def on_checkpoint(trainer: Trainer) -> None:
        metadata = {
            "config": constructor_arguments(network),
            "classes": json.dumps(wnids),
            "training": json.dumps({**training, "step": trainer.step}),
        }
        kind = getattr(torch, cfg.train.stored_as)
        tensors = {k: v.to(kind) for k, v in to_original(network).items()}
        write_atomic(out, tensor_bytes(tensors, metadata))
        images = samples(trainer, codec, wnids, compute)
        write_atomic(aside / "samples.png", sheet(images, columns=8))
        write_atomic(aside / "loss.png", loss_curve(trainer.losses))

    data = tensors_digest({"latents": latents, "labels": labels})
    with exclusive(aside):
        trainer = Trainer(network, settings, aside / "checkpoint.safetensors", data)
        trainer.train(latents, labels, on_checkpoint)
    log.info("weights: %s; samples and loss curve: %s", out, aside)


if __name__ == "__main__":
    command(main)

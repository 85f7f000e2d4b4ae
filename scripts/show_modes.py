"""Decode modes to one picture: a row per run, several classes side by side."""

from __future__ import annotations

import io
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
import matplotlib
import torch
from omegaconf import DictConfig
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from torchvision.utils import make_grid

from mgd3.backbones.codecs import make_codec
from mgd3.backbones.contract import Codec
from mgd3.config.schema import CONFIGS
from mgd3.data.pixels import to_pixels
from mgd3.modes.discovery import ModeFile
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError
from mgd3.storage.cache import found
from mgd3.storage.files import write_atomic


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="show_modes")
def main(cfg: DictConfig) -> None:
    """Write the picture; modes of fewer than `least` real images are left grey."""
    codec = make_codec(cfg.vae, cfg.image_size, compute=Compute())
    sets = [Path(folder) for folder in ([cfg.sets] if isinstance(cfg.sets, str) else cfg.sets)]
    rows = [torch.cat(_panels(folder, codec, cfg), dim=2) for folder in sets]
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(12, 0.75 * len(rows) + 0.2), squeeze=False, layout="constrained"
    )
    for axis, row, folder in zip(axes[:, 0], rows, sets, strict=True):
        axis.imshow(row.permute(1, 2, 0).numpy())
        axis.set_ylabel(folder.resolve().parents[1].name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    buffer, out = io.BytesIO(), Path(cfg.out)
    figure.savefig(buffer, format="jpeg" if out.suffix == ".jpg" else "png", dpi=130)
    write_atomic(out, buffer.getvalue())
    Console(markup=False).print(f"picture: {out}")


def _panels(folder: Path, codec: Codec, cfg: DictConfig) -> list[Tensor]:
    """One grid (3, H, W) per class, the first so many modes in a row."""
    files = sorted((folder / "modes").glob("*.safetensors"))
    files = [f for f in files if f.stem != "previews"][: cfg.classes]
    if not files:
        raise UserError(f"{folder} holds no modes: name a set that a method with modes made")
    panels = []
    for file in files:
        modes = found(file, {}, ModeFile())
        if modes is None:
            raise UserError(f"{file} holds no modes: make the set again")
        centers, counts = modes.centers[: cfg.modes], modes.counts[: cfg.modes]
        pixels = to_pixels(codec.decode(centers))
        pixels[counts < cfg.least] = 128
        panels.append(make_grid(pixels, nrow=cfg.modes, padding=1, pad_value=255))
    return panels


if __name__ == "__main__":
    command(main)

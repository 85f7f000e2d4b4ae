"""Decode modes to one picture: a row per run, several classes side by side."""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from torchvision.utils import make_grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.backbones.codecs import make_codec
from mgd3.config.schema import errors_for_people
from mgd3.data.pixels import to_pixels
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError
from mgd3.runtime.files import write_atomic
from mgd3.runtime.tensors import load_tensors


def main() -> None:
    """Write the picture; modes of fewer than --least real images are left grey."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sets", type=Path, nargs="+", metavar="SET", help="folders with modes/")
    parser.add_argument("--vae", help="the VAE's folder; leave out for pixel-space modes")
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--classes", type=int, default=2, help="the first so many")
    parser.add_argument("--modes", type=int, default=10, help="the first so many of each class")
    parser.add_argument(
        "--least", type=int, default=1, help="members of a mode that is shown: 1 shows photographs"
    )
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    codec = make_codec(options.vae, options.image_size, compute=Compute())
    rows = []
    for folder in options.sets:
        files = sorted((folder / "modes").glob("*.safetensors"))[: options.classes]
        if not files:
            raise UserError(f"{folder} holds no modes: name a set that a method with modes made")
        panels = []
        for file in files:
            modes = load_tensors(file)
            centers, counts = (modes[k][: options.modes] for k in ("centers", "counts"))
            pixels = to_pixels(codec.decode(centers))
            pixels[counts < options.least] = 128
            panels.append(make_grid(pixels, nrow=options.modes, padding=1, pad_value=255))
        rows.append(torch.cat(panels, dim=2))
    figure, axes = plt.subplots(
        len(rows), 1, figsize=(12, 0.75 * len(rows) + 0.2), squeeze=False, layout="constrained"
    )
    for axis, row, folder in zip(axes[:, 0], rows, options.sets, strict=True):
        axis.imshow(row.permute(1, 2, 0).numpy())
        axis.set_ylabel(folder.resolve().parents[1].name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="jpeg" if options.out.suffix == ".jpg" else "png", dpi=130)
    write_atomic(options.out, buffer.getvalue())
    Console().print(f"picture: {options.out}")


if __name__ == "__main__":
    with errors_for_people():
        main()

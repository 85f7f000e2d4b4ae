"""Make one image of a distilled set again, alone, and compare it with the file.

The manifest says everything but where things lie: the configuration's choices and values, the
image's noise stream. A picture of what the network restores on the way shows guidance at work.
"""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

import hydra
from omegaconf import DictConfig

from mgd3.config.command import command
from mgd3.config.schema import CONFIGS
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mgd3.data.distilled import DistilledDataset
    from mgd3.distillers.generative import GenerativeDistiller
    from mgd3.modes.discovery import ClassModes
    from mgd3.sampling.terms import DenoiseState

log = logging.getLogger(__name__)

_SHOWN = 10  # steps in the picture


class Watch:
    """Keeps what the network restores at some steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor]] = []

    def __call__(self, state: DenoiseState) -> None:
        """One step, before it is taken."""
        every = max(1, state.num_steps // _SHOWN)
        if (state.num_steps - 1 - state.step) % every == 0 or state.step == 0:
            self.seen.append((state.step, state.x0_hat.clone()))


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="remake_image")
def main(cfg: DictConfig) -> None:
    """Write the image, and say how far it is from the file."""
    from mgd3.config.build import build_distiller
    from mgd3.config.identity import overrides_of
    from mgd3.config.schema import composed, plain
    from mgd3.data.distilled import DistilledDataset
    from mgd3.distillers.generative import GenerativeDistiller

    distilled = DistilledDataset(Path(cfg["set"]))
    for key in ("out", "steps"):
        if cfg[key] and Path(cfg[key]).resolve().is_relative_to(distilled.folder.resolve()):
            raise UserError(f"{key}={cfg[key]} lies in the set: choose a place outside it")
    entry = _entry(distilled, cfg.image)
    given = plain(cfg["with"])
    own = composed(*overrides_of(distilled.identity, given), *given)
    distiller = build_distiller(own)
    if not isinstance(distiller, GenerativeDistiller) or not entry.get("noise_stream"):
        raise UserError(f"{cfg.image} was copied, not generated: {entry.get('nearest_real')}")
    watch = Watch()
    picture = _remade(distiller, distilled, own, entry, watch)
    _write(cfg, distilled, entry, picture)
    if cfg.steps:
        _picture_of_steps(Path(cfg.steps), distiller, watch)


def _entry(distilled: DistilledDataset, image: str) -> dict[str, Any]:
    entries = {entry["file"]: entry for entry in distilled.manifest["images"]}
    return entries[checks.choice("image", image, list(entries))]


def _remade(
    distiller: GenerativeDistiller,
    distilled: DistilledDataset,
    cfg: DictConfig,
    entry: dict[str, Any],
    watch: Watch,
) -> Any:
    """The image as a PIL picture of the files' size."""
    from PIL import Image

    from mgd3.data.pixels import to_pil

    seed, wnid, number = entry["noise_stream"].split("/")
    checks.choice("the class of a noise stream", wnid, [entry["wnid"]])
    keys = [(wnid, int(number))]
    classes = distilled.classes
    rows = dict(zip((c.wnid for c in classes), distiller.backbone.class_ids(classes), strict=True))
    found = _modes(distiller, distilled, wnid)
    with _weights(distiller, distilled, cfg, wnid):
        latents = distiller.sample(keys, rows, found, int(seed), watch)
    picture = to_pil(distiller.pixels(keys, latents)[0])
    side = (distiller.backbone.codec.output_size,) * 2
    return picture if picture.size == side else picture.resize(side, Image.Resampling.BICUBIC)


def _modes(
    distiller: GenerativeDistiller, distilled: DistilledDataset, wnid: str
) -> dict[str, ClassModes]:
    """The class's modes as the set keeps them; empty where nothing needs any."""
    from mgd3.modes.discovery import ClassModes, ModeFile
    from mgd3.storage.cache import found

    if not (distiller.guidance.needs_modes or distiller.start.needs_modes):
        return {}
    path = distilled.folder / "modes" / f"{wnid}.safetensors"
    modes = found(path, {}, ModeFile())
    if modes is None:
        raise UserError(f"{path} is missing: the set does not hold the modes it was made with")

    def latents() -> Tensor:
        raise UserError(f"guidance of {distilled.folder} reads real latents, which a set has not")

    return {wnid: ClassModes(modes=modes, nearest=[], latents=latents)}


def _weights(
    distiller: GenerativeDistiller, distilled: DistilledDataset, cfg: DictConfig, wnid: str
) -> Any:
    """The class's fine-tuned weights, inside the block; made again if the cache lacks them."""
    from contextlib import nullcontext

    from mgd3.config.build import build
    from mgd3.finetuning.phases import NoFineTuning

    if isinstance(distiller.finetune, NoFineTuning):
        return nullcontext()
    phases = distiller.finetune(distiller.backbone, build(cfg, "dataset"), distiller.work)
    phase = next(p for p in phases if wnid in [c.wnid for c in p.classes])
    return phase.applied(distiller.backbone)


def _write(
    cfg: DictConfig, distilled: DistilledDataset, entry: dict[str, Any], picture: Any
) -> None:
    import numpy as np
    from PIL import Image

    from mgd3.storage.files import write_atomic

    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    with Image.open(distilled.path(entry)) as file:
        apart = np.abs(np.asarray(file.convert("RGB"), int) - np.asarray(picture, int))
    write_atomic(Path(cfg.out), buffer.getvalue())
    log.info(
        "%s: %s; at most %d of 255 grey levels from the file (%d of %d values differ)",
        *(entry["file"], cfg.out, apart.max(), (apart > 0).sum(), apart.size),
    )


def _picture_of_steps(path: Path, distiller: GenerativeDistiller, watch: Watch) -> None:
    """One row: x0_hat decoded at some steps, from the first to the last."""
    import matplotlib

    matplotlib.use("Agg")
    import torch
    from matplotlib import pyplot as plt

    from mgd3.data.pixels import to_pixels
    from mgd3.storage.files import write_atomic

    pixels = to_pixels(torch.cat([distiller.backbone.codec.decode(x).cpu() for _, x in watch.seen]))
    figure, axes = plt.subplots(
        1, len(pixels), figsize=(1.3 * len(pixels), 1.6), squeeze=False, layout="constrained"
    )
    for axis, (step, _), image in zip(axes[0], watch.seen, pixels, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(f"step {step}", fontsize=8)
        axis.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())
    log.info("what the network restores, step by step: %s", path)


if __name__ == "__main__":
    command(main, positional="set", resumes=False)

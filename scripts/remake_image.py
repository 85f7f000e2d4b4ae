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

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig

from mgd3.config.schema import CONFIGS
from mgd3.runtime import checks
from mgd3.runtime.errors import UserError

if TYPE_CHECKING:
    from mgd3.config.remaking import Remaker
    from mgd3.data.distilled import DistilledDataset
    from mgd3.sampling.watching import StepWatch

log = logging.getLogger(__name__)

_SHOWN = 10  # steps in the picture


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="remake_image")
def main(cfg: DictConfig) -> None:
    """Write the image, and say how far it is from the file."""
    from mgd3.config.identity import overrides_of
    from mgd3.config.remaking import Remaker, refuse_other_versions
    from mgd3.config.schema import composed, plain
    from mgd3.data.distilled import DistilledDataset
    from mgd3.sampling.watching import StepWatch, spread_steps

    distilled = DistilledDataset(Path(cfg["set"]))
    for key in ("out", "steps"):
        if cfg[key] and Path(cfg[key]).resolve().is_relative_to(distilled.folder.resolve()):
            raise UserError(f"{key}={cfg[key]} lies in the set: choose a place outside it")
    entry = _entry(distilled, cfg.image)
    if not entry.get("noise_stream"):
        raise UserError(f"{cfg.image} was copied, not generated: {entry.get('nearest_real')}")
    if entry.get("prompt"):
        log.info("%s: its prompt is %r", cfg.image, entry["prompt"])
    given = plain(cfg["with"])
    if entry.get("prompt"):  # the captions that were chosen are the set's own
        given = ["prompts.captions=prompts.json", *given]
    own = composed(*overrides_of(distilled.identity, given), *given)
    refuse_other_versions(distilled.identity, own, given)
    remaker = Remaker(distilled, own)
    watch = StepWatch(spread_steps(remaker.distiller.sampler.steps, _SHOWN))
    _write(cfg, distilled, entry, _remade(remaker, entry, watch))
    if cfg.steps:
        _picture_of_steps(Path(cfg.steps), cfg.image, remaker, watch)


def _entry(distilled: DistilledDataset, image: str) -> dict[str, Any]:
    entries = {entry["file"]: entry for entry in distilled.manifest["images"]}
    return entries[checks.choice("image", image, list(entries))]


def _remade(remaker: Remaker, entry: dict[str, Any], watch: StepWatch) -> Any:
    """The image as a PIL picture of the files' size."""
    from PIL import Image

    from mgd3.data.pixels import to_pil

    distiller = remaker.distiller
    latents = remaker.latents(entry, watch)
    picture = to_pil(distiller.maker.pixels([(entry["wnid"], entry["index"])], latents)[0])
    side = (distiller.backbone.codec.output_size,) * 2
    return picture if picture.size == side else picture.resize(side, Image.Resampling.BICUBIC)


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


def _picture_of_steps(path: Path, image: str, remaker: Remaker, watch: StepWatch) -> None:
    """One row: x0_hat decoded at some steps, from the first to the last."""
    import torch

    from eval.reports.drawings.step_pictures import Trail, steps_picture
    from mgd3.storage.files import write_atomic

    pixels = remaker.decoded(torch.cat(list(watch.seen.values())))
    name = str(remaker.distilled.manifest["method"])
    trail = Trail(title=image, steps=list(watch.seen), rows={name: pixels})
    write_atomic(path, steps_picture([trail]))
    log.info("what the network restores, step by step: %s", path)


if __name__ == "__main__":
    command(main)

"""Publish a distilled set on the Hugging Face hub: images, manifest, and a card with its scores."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

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
    from mgd3.data.distilled import DistilledDataset


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="publish")
def main(cfg: DictConfig) -> None:
    """Check the set, upload it, print where it is."""
    from eval.hub import publish
    from eval.results.rows import read_results
    from eval.results.tables import markdown
    from mgd3.data.card import dataset_card
    from mgd3.data.distilled import DistilledDataset

    distilled = DistilledDataset(Path(str(cfg.set)))
    private, real = (checks.flag(key, cfg[key]) for key in ("private", "real"))
    licence = _licence(cfg.license)
    _check(distilled, Path(cfg.cache), real)
    rows = read_results(distilled.folder)
    card = dataset_card(distilled.manifest, licence, markdown(rows) if rows else "")
    print(publish(distilled, str(cfg.repo), card, private))


def _licence(name: str | None) -> str | None:
    """An identifier as the hub has them; it becomes a line of the card's header."""
    if name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]{0,49}", str(name)):
        raise UserError(
            f"license={name!r} is no identifier of a licence; allowed: what the hub calls them, "
            "such as cc-by-4.0, mit or other"
        )
    return name


def _check(distilled: DistilledDataset, cache: Path, real: bool) -> None:
    """`UserError` for a set that is not whole, is altered, or holds photographs of somebody's."""
    _ = distilled.identity  # its manifest can be read, and says what the set was made from
    distilled.verify(cache, workers=1)
    if not (distilled.generated or real):
        raise UserError(
            f"{distilled.folder} holds copies of real images, which may be somebody's: real=true "
            "publishes them; make sure that their licence allows it"
        )


if __name__ == "__main__":
    command(main)

"""How far each method moves the images that another makes of the same noise."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig
from rich.console import Console

from eval.metrics.shifts import image_shifts, shifts_layout
from eval.reports.run_report import distilled_sets, parted
from eval.results.sweeps import keys_of
from mgd3.config.schema import CONFIGS
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.runtime.machine import commit
from mgd3.storage.files import write_atomic, write_json
from scripts.measure import names_of

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="image_shifts")
def main(cfg: DictConfig) -> None:
    """Compare all finished sets of one IPC below `images`, pair by pair."""
    folder, keys = Path(str(cfg.images)).expanduser(), keys_of(cfg.by)
    sets, _ = parted(distilled_sets(folder))
    if not sets:
        raise UserError(f"images={folder} holds no finished distilled dataset")
    by_ipc: dict[int, dict[str, list[DistilledDataset]]] = defaultdict(lambda: defaultdict(list))
    for path, name in names_of(sets, keys).items():
        distilled = DistilledDataset(path)
        by_ipc[distilled.ipc][name].append(distilled)
    for ipc, methods in sorted(by_ipc.items()):
        found = image_shifts(methods)
        if not found:
            raise UserError(
                f"images={folder} holds no two sets of {ipc} images per class that were generated "
                "from the same noise, and none of two seeds"
            )
        table = shifts_layout(found, f"images moved, ipc {ipc}")
        out = folder / f"image_shifts-ipc{ipc}"
        write_json(
            out.with_suffix(".json"), {"commit": commit(), "shifts": [asdict(s) for s in found]}
        )
        write_atomic(out.with_suffix(".md"), table.markdown().encode())
        Console().print(table.for_terminal())
        log.info("shifts: %s.md", out)


if __name__ == "__main__":
    command(main)

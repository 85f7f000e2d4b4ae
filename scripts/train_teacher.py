"""Train a soft-label protocol's teacher on the full real set, or find it trained, and test it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig

from eval.images import TestImages
from eval.protocols.soft_label import SoftLabel
from mgd3.config.build import build, build_protocol
from mgd3.config.run_folder import begun, record
from mgd3.config.schema import CONFIGS
from mgd3.runtime.compute import pick_device
from mgd3.runtime.errors import UserError

log = logging.getLogger(__name__)


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="train_teacher")
def main(cfg: DictConfig) -> None:
    """A killed training goes on from its checkpoint; a finished teacher is only tested."""
    with begun(cfg) as folder:
        dataset, protocol = build(cfg, "dataset"), build_protocol(cfg)
        if not isinstance(protocol, SoftLabel):
            raise UserError(f"protocol={protocol.name} has no teacher; take protocol=soft_label")
    record(folder, cfg)
    test = TestImages(dataset, Path(cfg.cache), cfg.compute.workers)
    teacher = protocol.prepare(test, pick_device(cfg.compute.device))
    log.info(
        "teacher %s (%s): top-1 %.2f %% on the %d real test images of %s",
        *(teacher.name, teacher.source, teacher.top1),
        *(sum(len(dataset.images("val", k)) for k in range(len(dataset.classes))), dataset.name),
    )


if __name__ == "__main__":
    command(main)

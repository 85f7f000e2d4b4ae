"""Our way against the reference's way, on the same network and images, in one run.

sampling    one image at a time, its conditional and null pair as a batch of two  |  batched
evaluation  transforms per image in a DataLoader, float32; teachers; tests         |  on the device
backbone    DiT-XL/2: batches, precisions, compilation, share of the matrix rate
encoding    decoding and encoding of photographs, one after another  |  side by side
modes       every mode finder: time and memory per class
scale       a whole run of 10, 100 and 1,000 classes: exponents
precision   what tf32, bfloat16 and float16 change in the pixels
guidance    a step with each kind of term, a plain one  |  how many times as slow
threads     how OpenMP waits: a small student alone, and beside a busy core

Every measurement has a process of its own, so that peak memory is its own too. Times are the best
of several repetitions; the ratio is the number to read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mgd3.runtime.stopping import listen

listen()  # before what takes seconds to load: Ctrl-C then ends in a sentence, too

from mgd3.config.command import command, start

if __name__ == "__main__":
    start()  # and so do help and refusals

import hydra
from omegaconf import DictConfig

from mgd3.config.schema import CONFIGS, plain
from mgd3.runtime import checks
from scripts.timings import (
    backbone,
    encoding,
    evaluation,
    guided_steps,
    modes,
    precision,
    sampling,
    scale,
    threads,
)
from scripts.timings.stopwatch import default_device


@hydra.main(version_base="1.3", config_path=CONFIGS, config_name="benchmark")
def main(cfg: DictConfig) -> None:
    """Measure, and print a table for each subject."""
    options = plain(cfg)
    subjects = {
        "sampling": sampling.main,
        "evaluation": lambda: evaluation.main(options["epochs"]),
        "backbone": lambda: backbone.main(**_of_device(options["backbone"])),
        "modes": lambda: modes.main(
            Path(latents) if (latents := options["modes"]["latents"]) else None,
            options["modes"]["num_modes"],
            options["modes"]["workers"],
        ),
        "encoding": lambda: encoding.main(**options["encoding"]),
        "guidance": guided_steps.main,
        "precision": precision.main,
        "scale": lambda: scale.main(**options["scale"]),
        "threads": threads.main,
    }
    what = [options["what"]] if isinstance(options["what"], str) else options["what"]
    for subject in what:
        subjects[checks.choice("what", subject, subjects)]()


def _of_device(options: dict[str, Any]) -> dict[str, Any]:
    """The backbone's options, those that are null as fits the device."""
    on_gpu = default_device() == "cuda"
    fitting = {
        "steps": 50 if on_gpu else 2,
        "batches": [1, 8, 32, 64, 128] if on_gpu else [1, 4],
        "precisions": ["float32", *(["tf32"] if on_gpu else []), "bfloat16"],
        "compile": on_gpu,
    }
    chosen = {k: fitting.get(k) if v is None else v for k, v in options.items()}
    checks.choice("backbone.network", chosen["network"], sorted(sampling.SIZES))
    return chosen


if __name__ == "__main__":
    command(main)

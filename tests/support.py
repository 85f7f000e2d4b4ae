"""What several test modules need: composed configurations, result rows, golden files."""

import os
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir

from eval.reports.paper_cell import TableCell
from eval.results.rows import FULL, RANDOM, UNGUIDED, EvalResult
from mgd3.config.identity import register
from mgd3.config.schema import CONFIGS

GOLDEN = Path(os.environ.get("MGD3_GOLDEN_DIR", Path(__file__).parent / "golden"))


def composed(*overrides, name="config"):
    return _composed(overrides, name).copy()


@cache
def _composed(overrides, name):
    register()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return compose(name, overrides=list(overrides))


def row(method="mgd3", seed=0, student_seed=0, last=50.0, best=60.0, **other):
    values = {
        "dataset": "digits", "ipc": 10, "protocol": "p", "student": "convnet3", "tests": 10,
        "test_images": 719, "epochs": 3, "train_seconds": 1.0, "test_seconds": 0.1,
        "run_id": f"{method}{seed}", "cell_id": method, "commit": "c",
        "role": method if method in (RANDOM, FULL, UNGUIDED) else None,
    }  # fmt: skip
    return EvalResult(
        method=method, distill_seed=seed, student_seed=student_seed, top1_last=last,
        top1_best=best, **{**values, **other},
    )  # fmt: skip


def manifest(**values):
    """A manifest of one class and one image, which need not be there."""
    image = {"file": "images/0/00000.png", "wnid": "0", "index": 0, "sha256": "0" * 64}
    return {
        "dataset": "digits", "ipc": 10, "seed": 0, "method": "mgd3", "config": {},
        "classes": [{"wnid": "0", "name": "digit 0", "imagenet_id": None}], "images": [image],
    } | values  # fmt: skip


def cell(method, scores, paper=None, band=None, asked=3, ipc="10", **fields):
    rows = [
        row(method=method, seed=seed, student_seed=seed, best=best, last=best - 1, **fields)
        for seed, best in enumerate(scores)
    ]
    return TableCell(
        row=method, dataset="d", ipc=ipc, student="s", paper=paper, band=band, ours=tuple(rows),
        asked=asked,
    )  # fmt: skip

"""What several test modules need: composed configurations, result rows, golden files."""

import io
import os
import tarfile
from functools import cache
from pathlib import Path

import torch
from conftest import image
from hydra import compose, initialize_config_dir

from eval.reports.paper_cell import TableCell
from eval.results.rows import FULL, RANDOM, UNGUIDED, EvalResult
from mgd3.config.identity import register
from mgd3.config.schema import CONFIGS
from mgd3.data.class_lists import read_class_list

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


def packed(*members):
    """A .tgz of (name, content) files, or of TarInfo members as they are."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def small_archive():
    """imagenette2 with two photographs of each kind per class, mixed as fast.ai mixes them."""
    wnids, members = [c.wnid for c in read_class_list("imagenette")], []
    for label, wnid in enumerate(wnids):
        for k, folder in enumerate(("train", "val")):
            for name in (f"{wnid}_{k}", f"ILSVRC2012_val_{10 * label + k:08d}"):
                buffer = io.BytesIO()
                image(seed=10 * label + k).save(buffer, "JPEG")
                members.append((f"imagenette2/{folder}/{wnid}/{name}.JPEG", buffer.getvalue()))
    return packed(*members)


def line(*places):
    """Points (n, 1) on a line."""
    return torch.tensor(places, dtype=torch.float64).unsqueeze(1)


def normal(seed, *shape):
    """Normal numbers of a stream of their own."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

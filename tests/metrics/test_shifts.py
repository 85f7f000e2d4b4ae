"""How far images of the same noise lie apart, in closed form; and from the command line."""

import numpy as np
import pytest
from conftest import QUICK, run
from PIL import Image

from eval.metrics.shifts import image_shifts, shifts_layout
from mgd3.data.digits import Digits
from mgd3.data.distilled import DistilledDataset, DistilledWriter


def made(folder, seed, grey, streams=(0, 1)):
    """A set of two grey images of one digit."""
    writer = DistilledWriter(folder, Digits(8, classes=[3]), 2, seed)
    for k in range(2):
        writer.write_image("3", k, Image.fromarray(np.full((8, 8, 3), grey + 10 * k, np.uint8)))
    provenance = {"method": "m", "config": {}, "identity": {"seed": seed}, "data": {"train": None}}
    return writer.finish(provenance, {}, streams={"3": list(streams)})


def test_shifts_are_counted_over_shared_noise_alone(tmp_path):
    sets = {}
    for name, greys in {"plain": (0, 51), "near": (1, 52), "other": (0, 0)}.items():
        streams = (7, 0) if name == "other" else (0, 1)
        for seed, grey in enumerate(greys):
            made(tmp_path / name / str(seed), seed, grey, streams)
    for name in ("plain", "near", "other"):
        sets[name] = [DistilledDataset(tmp_path / name / str(seed)) for seed in (0, 1)]
    found = {(s.first, s.second): s for s in image_shifts(sets)}
    assert (
        found["plain", "near"].rms == pytest.approx(1 / 255) and found["plain", "near"].images == 4
    )
    # stream 0 of «other» is its second image
    assert found["plain", "other"].images == 2
    assert found["plain", "other"].rms == pytest.approx((10 + 41) / 2 / 255)
    assert found["plain", None].rms == pytest.approx(0.2)
    assert found["other", None].rms == 0
    text = shifts_layout(list(found.values()), "t").markdown()
    assert "| plain | near | 0.0039 | 2.0 % | 4 |" in text


def test_a_guidance_without_force_moves_nothing(tmp_path):
    for more in (("guidance.scale=0",), ("method=unguided",), ("method=random",)):
        done = run(
            tmp_path, *QUICK, "ipc=2", "dataset.classes=[0,1]", "runs=r", *more, "students=[]"
        )
        assert done.returncode == 0, done.stderr
    done = run(tmp_path, "images=r", script="scripts/image_shifts.py")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "r/image_shifts-ipc2.md").read_text().splitlines()
    assert [line for line in lines if "0.0000" in line and line.endswith("| 4 |")]
    none = run(tmp_path, "images=r/digits/random", script="scripts/image_shifts.py")
    assert none.returncode == 1 and "generated from the same noise" in none.stderr

"""Sweeps: rows named by a key's value, their picture, and what stages cost."""

import io

import pytest
from PIL import Image
from support import row

from eval.reports.run_report import distilled_sets, named
from eval.results.costs import cost_layout
from eval.results.rows import ResultStore
from eval.results.sweeps import rows_by, sweep_picture
from mgd3.runtime.errors import UserError
from mgd3.runtime.files import write_json


@pytest.fixture
def sweep(tmp_path):
    """mgd3 at three lambdas and two seeds, unguided once; what a run leaves of each."""
    for scale, seed in [(0.02, 0), (0.1, 0), (0.1, 1), (1, 0), (None, 0)]:
        method = "mgd3" if scale else "unguided"
        folder = tmp_path / f"{method}-{scale}-{seed}"
        guidance = {"_target_": "mode", "scale": scale} if scale else {"_target_": "none"}
        write_json(
            folder / "manifest.json",
            {
                "method": method, "ipc": 10, "choices": {"modes": "kmeans"},
                "config": {"guidance": guidance}, "images": [],
            },
        )  # fmt: skip
        write_json(folder / "times.json", {"sample": 2.0 + seed})
        store = ResultStore(folder / "p-1/results.jsonl")
        store.append(row(method, seed, last=50 + 10 * (scale or 0), cell_id=f"{method}{scale}"))
    return tmp_path


def test_rows_are_named_by_the_value_and_stand_in_its_order(sweep):
    rows, values = rows_by(sweep, "guidance.scale")
    names = ["unguided", "mgd3 scale=0.02", *["mgd3 scale=0.1"] * 2, "mgd3 scale=1"]
    assert [r.method for r in rows] == names
    assert values == {"mgd3 scale=0.02": 0.02, "mgd3 scale=0.1": 0.1, "mgd3 scale=1": 1}
    picture = Image.open(io.BytesIO(sweep_picture(rows, values, "guidance.scale")))
    assert picture.size[0] > picture.size[1] > 300
    assert len(picture.convert("L").getcolors()) > 20  # something is drawn


def test_a_key_without_two_values_is_refused(sweep):
    for key in ("modes", "guidance.nothing"):
        with pytest.raises(UserError, match=f"--by {key}: no method .* more than one value"):
            rows_by(sweep, key)


def test_costs_are_means_per_stage(sweep):
    rows, _ = rows_by(sweep, "guidance.scale")
    table = cost_layout(*named(distilled_sets(sweep), rows))
    assert table.headers == ["method", "stage", "seconds, ipc 10"]
    assert ["mgd3", "sample, a set", "2.25"] in table.lines
    assert ["unguided", "training, a convnet3", "1.00"] in table.lines

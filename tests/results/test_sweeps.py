"""Sweeps: rows named by a key's value, their picture, and what stages cost."""

import io

import pytest
from PIL import Image
from support import manifest, row

from eval.reports.drawings.curves import sweep_picture
from eval.reports.run_report import distilled_sets, first_of_each_row, named, row_names
from eval.results.cells import cells
from eval.results.costs import cost_layout
from eval.results.rows import ResultStore, read_results
from eval.results.sweeps import keys_of, places_of, rows_by, value_of
from mgd3.data.distilled import DistilledDataset
from mgd3.runtime.errors import UserError
from mgd3.storage.files import write_json
from scripts.measure import names_of


@pytest.fixture
def sweep(tmp_path):
    """mgd3 at three lambdas and two seeds, unguided once; what a run leaves of each."""
    for scale, seed in [(0.02, 0), (0.1, 0), (0.1, 1), (1, 0), (None, 0)]:
        method = "mgd3" if scale else "unguided"
        folder = tmp_path / f"{method}-{scale}-{seed}"
        guidance = {"_target_": "mode", "scale": scale} if scale else {"_target_": "none"}
        write_json(
            folder / "manifest.json",
            manifest(method=method, choices={"modes": "kmeans"}, config={"guidance": guidance}),
        )
        write_json(folder / "times.json", {"sample": 2.0 + seed})
        store = ResultStore(folder / "p-1/results.jsonl")
        store.append(
            row(method, seed, last=50 + 10 * (scale or 0), cell_id=f"{method}{scale}", protocol="p")
        )
    return tmp_path


def test_rows_are_named_by_the_value_and_stand_in_its_order(sweep):
    rows, values = rows_by(read_results(sweep), [sweep], ["guidance.scale"])
    variants = ["scale=0.02", "scale=0.1", "scale=0.1", "scale=1"]
    assert [(r.method, r.variant) for r in rows] == [
        ("unguided", None),
        *(("mgd3", v) for v in variants),
    ]
    assert values == {"scale=0.02": (0.02,), "scale=0.1": (0.1,), "scale=1": (1,)}
    assert [c.method for c in cells(rows)][1:] == [f"mgd3 {v}" for v in sorted(set(variants))]
    picture = Image.open(
        io.BytesIO(sweep_picture(rows, {k: v for k, (v,) in values.items()}, "guidance.scale"))
    )
    assert picture.size[0] > picture.size[1] > 300
    assert len(picture.convert("L").getcolors()) > 20  # something is drawn


def test_a_key_without_two_values_is_refused(sweep):
    for key, why in (("modes", "no method .* more than one value"), ("no.such", "no run has such")):
        with pytest.raises(UserError, match=f"by={key}: {why}"):
            rows_by(read_results(sweep), [sweep], [key])


def test_several_keys_tell_rows_apart_together(tmp_path):
    """Of each method those keys are named of which it had several values."""
    settings = [("kmeans", 0.1), ("gmm", 0.1), ("gmm", 2), ("gmm", 10)]
    for modes, scale in settings:
        folder = tmp_path / f"{modes}-{scale}"
        made = {"identity": {"modes": {"choice": modes}}, "config": {"guidance": {"scale": scale}}}
        write_json(folder / "manifest.json", manifest(**made))
        ResultStore(folder / "p/results.jsonl").append(row(cell_id=folder.name))
    write_json(tmp_path / "plain/manifest.json", manifest(method="unguided"))
    ResultStore(tmp_path / "plain/p/results.jsonl").append(row("unguided"))
    rows, values = rows_by(read_results(tmp_path), [tmp_path], ["modes", "guidance.scale"])
    assert [r.name for r in rows] == [
        "unguided", "mgd3 modes=gmm scale=0.1", "mgd3 modes=gmm scale=2", "mgd3 modes=gmm scale=10",
        "mgd3 modes=kmeans scale=0.1",
    ]  # fmt: skip
    assert values["modes=gmm scale=10"] == ("gmm", 10)
    sets = distilled_sets(tmp_path)
    assert set(row_names(sets, rows).values()) == {r.name for r in rows}
    assert list(first_of_each_row(sets, rows)) == [r.name for r in rows]
    with pytest.raises(UserError, match=r"by=.*give a key or a list"):
        keys_of(["modes", "modes"])


def test_what_the_students_did_tells_rows_apart(tmp_path):
    """Two students of one set: their precision and their protocol's options are the scores' own."""
    write_json(tmp_path / "manifest.json", manifest())
    made = {"p-1": ("float32", {}), "p-2": ("bfloat16", {"epochs": 20, "crops": [0.5, 1]})}
    for folder, (precision, values) in made.items():
        ResultStore(tmp_path / folder / "results.jsonl").append(row(cell_id=folder))
        of_scores = {"protocol": {"choice": "p", "values": values}, "training_precision": precision}
        write_json(tmp_path / folder / "protocol.json", {"identity": of_scores})
    rows, values = rows_by(read_results(tmp_path), [tmp_path], ["training_precision"])
    assert [r.variant for r in rows] == [f"training_precision={p}" for p in ("bfloat16", "float32")]
    rows, _ = rows_by(read_results(tmp_path), [tmp_path], ["protocol.epochs"])
    assert [r.variant for r in rows] == ["epochs=20", "epochs=as the protocol"]
    rows, _ = rows_by(read_results(tmp_path), [tmp_path], ["protocol.crops"])
    assert [r.variant for r in rows] == ["crops=[0.5, 1]", "crops=as the protocol"]
    assert keys_of(["compute.precision", "protocol"]) == ["precision", "protocol"]


def test_a_choice_that_goes_unsaid_is_a_value(tmp_path):
    for name, said in (("plain", {}), ("moved", {"refine": {"choice": "latent_optimisation"}})):
        write_json(tmp_path / name / "manifest.json", manifest(identity={"seed": 0, **said}))
        ResultStore(tmp_path / name / "p/results.jsonl").append(row(cell_id=name))
    rows, _ = rows_by(read_results(tmp_path), [tmp_path], ["refine"])
    assert [r.variant for r in rows] == ["refine=latent_optimisation", "refine=none"]


def test_seeds_as_a_sweep_are_cells_of_their_own(tmp_path):
    for seed in (0, 1):
        write_json(tmp_path / f"{seed}/manifest.json", manifest(identity={"seed": seed}))
        ResultStore(tmp_path / f"{seed}/p/results.jsonl").append(row(seed=seed, last=50.0 + seed))
    rows, _ = rows_by(read_results(tmp_path), [tmp_path], ["seed"])
    assert [(c.method, c.top1_last_mean) for c in cells(rows)] == [
        ("mgd3 seed=0", 50.0),
        ("mgd3 seed=1", 51.0),
    ]


def test_values_are_those_of_a_sets_identity_and_configuration():
    modes = {"choice": "kmeans", "version": 2, "values": {}}
    made = {
        "identity": {"modes": modes, "ipc": 5}, "choices": {"start": "noise"},
        "config": {"guidance": {"scale": 0.1, "a.b": 2}, "modes": {"n": {"init": 1}}, "pool": 3},
    }  # fmt: skip
    keys = ("modes", "ipc", "pool", "guidance.scale", "guidance.a.b", "modes.n.init")
    assert [value_of(made, k) for k in keys] == ["kmeans", 5, 3, 0.1, 2, 1]
    missing = ("guidance", "start", "guidance.nothing", "pool.x")
    assert [value_of(made, k) for k in missing] == [None] * 4
    del made["identity"]  # as sets of earlier versions are
    assert value_of(made, "start") == "noise"


def test_costs_are_means_per_stage(sweep):
    rows, _ = rows_by(read_results(sweep), [sweep], ["guidance.scale"])
    table = cost_layout(*named(distilled_sets(sweep), rows))
    assert table.headers == ["method", "stage", "seconds, ipc 10"]
    assert ["mgd3", "sample, a set", "2.25"] in table.lines
    assert ["unguided", "training, a convnet3", "1.00"] in table.lines


def test_runs_are_sorted_by_the_size_of_their_values():
    values = [("kmeans", 0.2), ("gmm", 10.0), ("kmeans", None), ("gmm", 9.0)]
    places = places_of(values)
    assert sorted(values, key=lambda v: places[values.index(v)]) == [
        ("gmm", 9.0), ("gmm", 10.0), ("kmeans", None), ("kmeans", 0.2),
    ]  # fmt: skip


def test_measure_lists_the_sets_of_a_sweep_in_its_order(tmp_path):
    """Whatever their folders are called."""
    for name, scale, seed in [("a", 0.2, 1), ("b", 0.05, 0), ("c", 0.2, 0), ("d", 10.0, 0)]:
        config = {"guidance": {"scale": scale}}
        content = manifest(seed=seed, config=config, identity={"s": scale}, data={"train": None})
        write_json(tmp_path / name / "manifest.json", content)
    names = names_of([DistilledDataset(tmp_path / n) for n in "abcd"], ["guidance.scale"])
    assert "".join(folder.name for folder in names) == "bcad"
    assert list(names.values()) == [f"mgd3 scale={s}" for s in (0.05, 0.2, 0.2, 10.0)]

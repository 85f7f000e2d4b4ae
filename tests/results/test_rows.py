"""Result rows on disk, and tables against arithmetic by hand."""

import json
from dataclasses import asdict, replace

import pytest
from scipy.stats import ttest_rel
from support import row

from eval.reports.run_report import write_summary
from eval.results.cells import cells
from eval.results.rows import ResultStore, read_results
from eval.results.tables import explanation, layout, markdown, minus_unguided, notes
from mgd3.runtime.errors import UserError


def test_rows_survive(tmp_path):
    store = ResultStore(tmp_path / "deep/results.jsonl")
    assert store.rows() == []
    rows = [row(), row(student_seed=1)]
    for r in rows:
        store.append(r)
    assert store.rows() == rows
    assert store.has("convnet3", 1)
    assert not store.has("convnet3", 2)


def test_a_line_cut_short_is_dropped(tmp_path):
    store = ResultStore(tmp_path / "results.jsonl")
    store.append(row())
    with store.path.open("a") as file:
        file.write('{"dataset": "dig')
    assert store.rows() == [row()]
    store.append(row(student_seed=1))
    assert store.rows() == [row(), row(student_seed=1)]
    assert [json.loads(line) for line in store.path.read_text().splitlines()]


def test_means_and_deviations():
    rows = [row(seed=s, last=v, best=v + 10) for s, v in enumerate((40.0, 50.0, 60.0))]
    (cell,) = cells(rows)
    assert (cell.top1_last_mean, cell.top1_best_mean, cell.n) == (50.0, 60.0, 3)
    assert cell.top1_last_std == pytest.approx((200 / 3) ** 0.5)  # population, as np.std
    assert (cell.distill_seeds, cell.student_seeds) == (3, 1)


def test_differences_are_paired_by_distillation_seed():
    ours, theirs = (51.0, 57.0, 60.0, 62.0), (50.0, 52.0, 61.0, 55.0)
    rows = [row(seed=s, last=v) for s, v in enumerate(ours)]
    rows += [row("unguided", seed=s, last=v) for s, v in reversed(list(enumerate(theirs)))]
    rows.append(row("unguided", seed=9, last=0.0))  # has no partner
    difference, of_itself = minus_unguided(rows, cells(rows))
    interval = ttest_rel(ours, theirs).confidence_interval(0.95)
    assert difference.mean == pytest.approx(3.0)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    assert difference.n == 4
    assert of_itself is None
    named = [replace(r, method=r.method[::-1]) for r in rows]  # the role says who is held against
    assert minus_unguided(named, cells(named)) == [difference, None]


def test_student_seeds_are_averaged_before_pairing():
    rows = [row(seed=s, student_seed=t, last=50.0 + 10 * t + s) for s in (0, 1) for t in (0, 1)]
    rows += [row("unguided", seed=s, last=50.0) for s in (0, 1)]
    difference, _ = minus_unguided(rows, cells(rows))
    assert (difference.mean, difference.n) == (5.5, 2)


def test_tables_say_what_they_hold(tmp_path):
    note = "these files are fast.ai's re-split"
    rows = [row(dataset_note=note), row("unguided", dataset_note=note)]
    text = markdown(rows)
    assert "**digits, ipc 10, p, convnet3**" in text
    assert "| mgd3 | 50.0 ± – | 60.0 ± – | 1 | +0.0 [–] |" in text
    assert note in text
    write_summary(tmp_path / "summary.json", rows)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {
        "method", "dataset", "ipc", "protocol", "student", "top1_last_mean", "top1_last_std",
        "top1_best_mean", "n",
    } <= summary["rows"][0].keys()  # fmt: skip


def test_runs_below_a_folder_are_read_once(tmp_path):
    ResultStore(tmp_path / "a/x/results.jsonl").append(row())
    ResultStore(tmp_path / "a/copy/results.jsonl").append(row())
    ResultStore(tmp_path / "b/results.jsonl").append(row("unguided"))
    assert len(read_results(tmp_path)) == 2


def test_two_configurations_of_one_name_stay_apart():
    rows = [row(cell_id="aa"), row(cell_id="bb", last=70.0), row("unguided")]
    assert {(c.method, c.top1_last_mean) for c in cells(rows)} == {
        ("mgd3 #aa", 50.0),
        ("mgd3 #bb", 70.0),
        ("unguided", 50.0),
    }


def test_trainings_of_other_lengths_are_named_and_not_held_against_each_other():
    rows = [row("random", last=60.0, epochs=60, cell_id="aa"), row("unguided", epochs=60)]
    rows += [row("random", last=70.0, epochs=300, cell_id="bb")]
    found = cells(rows)
    assert [c.method for c in found] == ["random, 60 epochs", "unguided", "random, 300 epochs"]
    shorter, _, longer = minus_unguided(rows, found)
    assert shorter.mean == 10.0 and longer is None
    assert "by=KEY" not in explanation(rows)
    twins = [row(cell_id="aa"), row(cell_id="bb")]
    assert "by=KEY of scripts/report.py" in explanation(twins)


def test_what_differs_gets_a_column():
    table = layout([row(), row(cell_id="x", ipc=20)])
    assert table.title == "digits, p, convnet3"
    assert table.headers == ["ipc", "method", "top1_last", "top1_best", "n"]
    assert [line[0] for line in table.lines] == ["10", "20"]


def test_lines_of_earlier_versions_are_read(tmp_path):
    old = {k: v for k, v in asdict(row()).items() if k not in ("role", "labels", "train_data")}
    (tmp_path / "results.jsonl").write_text(json.dumps(old | {"unknown": 1}) + "\n")
    assert ResultStore(tmp_path / "results.jsonl").rows() == [row()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top1_last": "50"}, "line 1: top1_last is '50'"),
        ({"top1_last": None}, "line 1: top1_last is None"),
        ({"top1_best": float("nan")}, "line 1: top1_best is nan"),
        ({"top1_best": 100.1}, "line 1: top1_best is 100.1"),
        ({"ipc": 0}, "line 1: ipc is 0"),
        ({"method": "a/b"}, "line 1: method is 'a/b': is no name"),
        ({"student_seed": True}, "line 1: student_seed is True"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, values, message):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(asdict(row()) | values) + "\n")
    with pytest.raises(UserError, match=f"{message}.*take that line out"):
        ResultStore(path).rows()


@pytest.mark.parametrize("text", ["{", "[]", "5", "null", '{"dataset": "digits"}', "\xff"])
def test_a_line_that_is_no_row_is_named(tmp_path, text):
    (tmp_path / "results.jsonl").write_text(json.dumps(asdict(row())) + "\n" + text + "\n")
    with pytest.raises(UserError, match=r"results\.jsonl, line 2"):
        ResultStore(tmp_path / "results.jsonl").rows()


def test_a_row_of_another_run_is_refused(tmp_path):
    mine = row(run_id="0123abcd")
    store = ResultStore(tmp_path / "p-0123abcd/results.jsonl", "0123abcd")
    store.append(mine)
    assert store.rows() == ResultStore(store.path).rows() == [mine]
    store.append(replace(mine, run_id="ffffffff", student_seed=1, top1_best=99.9))
    for reader in (store, ResultStore(store.path)):
        with pytest.raises(UserError, match=r"row 2, is of run ffffffff, .* is run 0123abcd's"):
            reader.rows()
    elsewhere = ResultStore(tmp_path / "p-89abcdef/results.jsonl")  # a folder that was renamed
    elsewhere.append(mine)
    with pytest.raises(UserError, match="is of run 0123abcd, but this folder is run 89abcdef's"):
        elsewhere.rows()


def test_tables_say_what_their_rows_were_not_all_trained_with():
    one = row(
        threads=1, machine="m", versions="torch 2.11", deterministic=True, compiled=False,
        channels_last=False,
    )  # fmt: skip
    assert not [n for n in notes([one, replace(one, student_seed=1)]) if "Warning" in n]
    assert not [n for n in notes([one, row(student_seed=1)]) if "Warning" in n]  # not known
    found = notes([one, replace(one, threads=2, deterministic=False, versions="torch 2.12")])
    assert [n.split(" stand here")[0] for n in found] == [
        "Warning: rows of different thread counts", "Warning: rows of different versions",
        "Warning: rows of different compute.deterministic",
    ]  # fmt: skip
    assert "(1; 2)" in found[0] and "(torch 2.11; torch 2.12)" in found[1]


def test_rows_of_replaced_photographs_are_another_cell(tmp_path):
    before, after = row(train_data="a" * 16), row(train_data="b" * 16, last=70.0)
    for name, r in (("before", before), ("after", after), ("copy", after)):
        ResultStore(tmp_path / name / "results.jsonl").append(r)
    rows = read_results(tmp_path)
    assert len(rows) == 2
    assert {(c.method, c.top1_last_mean) for c in cells(rows)} == {
        ("mgd3 #mgd3 train aaaaaaaa", 50.0),
        ("mgd3 #mgd3 train bbbbbbbb", 70.0),
    }
    warning = "Warning: rows of different real images of digits stand here."
    assert warning in notes(rows) and warning in explanation(rows)
    assert notes([after, after]) == notes([row(), row("unguided", train_data="a")]) == []
    assert warning in notes([row(), row(test_data="t")])


def test_differences_are_among_the_same_real_images():
    rows = [
        row(method, seed, last=last + 10 * (data == "new"), train_data=data, test_data=data)
        for data in ("old", "new")
        for method, last in (("mgd3", 60.0), ("unguided", 50.0))
        for seed in (0, 1)
    ]
    found = cells(rows)
    assert [d and d.mean for d in minus_unguided(rows, found)] == [10.0, None, 10.0, None]
    crossed = [r for r in rows if (r.method == "mgd3") == (r.test_data == "new")]
    assert minus_unguided(crossed, cells(crossed)) == [None, None]
    reads_none = [r if r.method == "mgd3" else replace(r, train_data=None) for r in rows]
    assert [d and d.mean for d in minus_unguided(reads_none, cells(reads_none))] == [
        10.0, None, 10.0, None,
    ]  # fmt: skip

"""The paper's tables as grids: cells compose, filters filter, runs are found."""

import csv
import io
import re
from itertools import product
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from support import cell, row

from eval.reports.comparison import PaperComparison
from eval.reports.paper_cell import MEAN, averaged
from eval.results.layout import Span
from mgd3.config.build import build, build_distiller, build_protocol
from mgd3.config.grid import Experiment, paper_files, read_request
from mgd3.config.identity import register
from mgd3.config.paper import read_table
from mgd3.config.schema import CONFIGS, composed, validate
from mgd3.runtime.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def _schemas():
    register()


NAMES = [*(f"table{n}" for n in range(1, 11)), *(f"figure{n}" for n in range(4, 12))]


SECOND = [f"self_adaptive_memory/{n}" for n in ("table1", "table2", "table3", "figure3", "figure4")]


FIELD = [f"field/table{n}" for n in (1, 2, 3)]
OF_FIELD = yaml.safe_load(Path(CONFIGS, "field.yaml").read_text())


# Of a sweep one value of each key. The field's tables differ in the protocol alone.
SOME = {
    SECOND[-1]: {
        "row": ["lambda_r 0.004", "lambda_g 0.004", "N_R 32", "N_G 128", "MinMaxDiff"],
    },
    FIELD[0]: {"dataset": ["imagenette"]},
    FIELD[1]: {"row": ["MGD3"]},
    FIELD[2]: {"row": ["RDED"], "dataset": ["imagenette", "imagenet1k"]},
}


def grid_of(name, overrides=(), rehearsal=False, **only):
    file = name if "/" in name else f"mgd3/{name}"
    return Experiment(file, overrides, only, rehearsal)


def test_all_tables_and_figures_are_there():
    assert paper_files() == [*(f"mgd3/{name}" for name in NAMES), *FIELD, *SECOND]
    tables = [grid_of(name).table for name in FIELD]
    assert all(table.rows == OF_FIELD for table in tables)
    assert {tuple(table.grid["dataset"]) for table in tables} == {
        ("imagenette", "imagewoof", "imageidc", "imagenet100", "imagenet1k")
    }


def test_a_row_may_say_what_its_scripts_set_for_a_dataset_or_a_number_of_images():
    def constants(row, *keys, **only):
        table = grid_of(FIELD[0], ["dataset.root=x"], row=[row], seed=["0"], **only)
        return {
            (p.job.dataset, int(p.job.ipc)): tuple(OmegaConf.select(p.cfg, key) for key in keys)
            for p in table.located
        }

    cao2 = constants(
        "CaO2", "pool", "refine.label", "refine.upper", "select.order", ipc=["10", "50"]
    )
    assert cao2 == {
        ("imagenette", 10): (2, "class", 11, "descending"),
        ("imagenette", 50): (2, "class", 11, "ascending"),
        ("imagewoof", 10): (4, "none", 11, "descending"),
        ("imagewoof", 50): (4, "none", 11, "ascending"),
        ("imageidc", 10): (2, "none", 11, "descending"),
        ("imageidc", 50): (2, "none", 11, "ascending"),
        ("imagenet100", 10): (2, "none", 5, "ascending"),
        ("imagenet100", 50): (2, "none", 5, "ascending"),
        ("imagenet1k", 10): (4, "none", 11, "descending"),
        ("imagenet1k", 50): (4, "none", 11, "ascending"),
    }
    both = constants("ManifoldGD", "guidance.radius", "guidance.bandwidth", ipc=["10"])
    assert [both[name, 10] for name in ("imagenette", "imagewoof", "imagenet1k")] == [
        (0.05, 0.2), (0.1, 0.2), (0.1, 0.1),
    ]  # fmt: skip
    with pytest.raises(UserError, match="varies pool itself"):
        grid_of(FIELD[0], ["dataset.root=x", "pool=8"])


def test_a_rehearsal_may_run_some_of_a_grid_and_a_filter_asks_for_other_cells():
    some = grid_of(FIELD[0], rehearsal=True).jobs
    assert {(j.dataset, j.ipc) for j in some} == {
        ("imagenette", ipc) for ipc in ("10", "50", "full")
    }
    assert {j.seed for j in some} == {0, 1}
    other = grid_of(FIELD[0], rehearsal=True, ipc=["20"], dataset=["imagewoof"]).jobs
    assert {(j.dataset, j.ipc) for j in other} == {("imagewoof", "20")}


def test_another_papers_tables_are_named_with_it_and_have_folders_of_their_own():
    for typed, file in (("1", "mgd3/table1"), ("self_adaptive_memory/1", SECOND[0])):
        request = read_request(composed(f"table={typed}", name="reproduce"), [f"table={typed}"])
        assert request.name == file and request.overrides == ()
    assert grid_of("table1").variant == "table1"
    assert grid_of(SECOND[0]).variant == "self_adaptive_memory-table1"


def test_a_sweep_may_have_several_keys():
    table = grid_of("self_adaptive_memory/figure4").table
    assert {key: len(rows) for key, rows in table.swept.items()} == {
        "finetune.representativeness": 5, "finetune.diversity": 5,
        "finetune.memory_real": 5, "finetune.memory_generated": 5,
    }  # fmt: skip
    defaults = ["lambda_r 0.002", "lambda_g 0.008", "N_R 64", "N_G 64"]
    places = grid_of(
        "self_adaptive_memory/figure4", ["dataset.root=x"], seed=["0"], row=defaults
    ).located
    assert len(places) == 4 and len({p.folder for p in places}) == 1


def test_keys_of_a_tables_dataset_may_be_typed_though_digits_lack_them():
    """Hydra composes before the table is known: what is added for it stands as it was typed."""
    typed = ["table=1", "++dataset.root=x", "+dataset.mine=1", "++compute.batch_size=8"]
    cfg = composed("table=1", "++dataset.root=x", name="reproduce")
    assert read_request(cfg, typed).overrides == (
        "dataset.root=x", "+dataset.mine=1", "++compute.batch_size=8",
    )  # fmt: skip


@pytest.fixture(scope="module")
def built():
    """Rows whose runs in rehearsal were built already."""
    return set()


@pytest.mark.parametrize("name", [*NAMES, *SECOND, *FIELD])
def test_every_cell_composes(name, built):
    """At the paper's size, and in rehearsal, where a run of every row can be built."""
    some = SOME.get(name, {})
    paper = grid_of(name, ["dataset.root=x"], **some)
    for place in paper.located:
        validate(place.cfg)
        assert place.cfg.dataset.name == place.job.dataset
        assert place.job.ipc == "full" or place.cfg.ipc == int(place.job.ipc)
        assert place.cfg.seed == place.job.seed
    students = [(p.folder, student, seed) for p in paper.located for student, seed in p.wanted]
    shared = len(paper.table.swept) > 1  # the default is a row of every key's sweep
    assert len(set(students)) == len(students) or shared

    rehearsal = grid_of(name, rehearsal=True, **some)
    assert {j.row for j in rehearsal.jobs} == {j.row for j in paper.jobs}
    for job in {job.row: job for job in rehearsal.jobs}.values():
        settings = tuple(o for o in job.overrides if not o.startswith(("paper=", "seed=")))
        if (settings, tuple(rehearsal.students)) in built:  # in another table
            continue
        built.add((settings, tuple(rehearsal.students)))
        place = rehearsal.locate(job)
        assert place.cfg.dataset.name == "digits"
        build_distiller(place.cfg)
        dataset, protocol = build(place.cfg, "dataset"), build_protocol(place.cfg)
        for student, _ in place.wanted:
            protocol.recipe(place.cfg.ipc, len(dataset.classes), student)


@pytest.mark.parametrize("name", [*NAMES, *SECOND, *FIELD])
def test_files_open_with_their_claim(name):
    file = name if "/" in name else f"mgd3/{name}"
    text = Path(CONFIGS, "paper", f"{file}.yaml").read_text()
    head = text.split("defaults:")[0]
    number = re.sub(".*/|[a-z]", "", name)
    assert re.search(rf"(Table|Figure) {number}( of .*)?: ", head)
    for word in ("scripts/reproduce.py", "rehearsal=true", "# Cost", "RTX A5000", "# Open: "):
        assert word in head, word


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table=11"], r"table='11' is unknown.*Allowed: 1, 2, 3"),
        (["figure=3"], r"figure='3' is unknown.*Allowed: 4, 5"),
        (["table=1", "figure=7"], "name one of them"),
        ([], "name one of them"),
    ],
)
def test_requests_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        read_request(composed(*arguments, name="reproduce"), arguments)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        (
            {"ipc": ["7"]},
            r"only\.ipc=7: table1 has no such ipc; there are row=Random, .*ipc=10, 20, 50, full",
        ),
        (
            {"dataset": ["imagewoof"]},
            r"imageidc; .*; imagewoof is in .*table=8, .*figure=self_ad.*/4",
        ),
        ({"dataset": ["imagewolf"]}, r"no such dataset; there are .*student=resnetap10$"),
        ({"method": ["mgd3"]}, "'method' is unknown.*Allowed: row, dataset, ipc, seed, student"),
        ({"ipc": [""]}, r"give values, such as only\.ipc=10,20"),
        ({"student": ["convnet6"]}, r"only\.student=convnet6: table1 has no such student"),
        ({"row": ["FullDataset"], "ipc": ["10"]}, "leaves no run of table1"),
    ],
)
def test_empty_filters_say_what_there_is(only, message):
    with pytest.raises(UserError, match=message):
        grid_of("table1", **only)


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("table1", "ipc=10"),
        ("table1", "seed=1"),
        ("table1", "dataset=imagewoof"),
        ("table1", "backbone=dit_xl2_512"),
        ("table1", "backbone.weights=mine.pt"),
        ("figure7", "guidance.stop_t=20"),
        ("figure7", "guidance=none"),
        ("table10", "protocol=hard_label"),
    ],
)
def test_what_a_table_varies_cannot_be_overridden(name, override):
    """It would put one run into several cells, beside numbers that are not its own."""
    with pytest.raises(UserError, match=rf"{override}: {name} varies .* only.KEY=VALUE"):
        grid_of(name, [override])


def test_other_overrides_make_another_table():
    plain, bfloat16, tracked = (
        grid_of("table5", overrides).variant
        for overrides in (
            [],
            ["compute.precision=bfloat16"],
            ["tracker=none", "compute.batch_size=8"],
        )
    )
    assert plain == tracked == "table5"
    assert re.fullmatch(r"table5-[0-9a-f]{8}", bfloat16)


def where(case, as_list=True):
    return {"rows": {"a": {"method": "mgd3", "where": [case] if as_list else case}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": None}, "paper_table.rows is missing"),
        ({"rows": {"plain": None}}, "paper_table.rows.plain must be a mapping"),
        ({"claims": [{"more": "a"}]}, "needs «more» and «than»"),
        ({"colums": 1}, "'colums' is unknown"),
        ({"points": "dots"}, "paper_table.points='dots' is unknown. Allowed: set, class, image"),
        ({"denoising": {"steps": [1]}}, r"paper_table\.denoising\.classes is missing"),
        ({"denoising": {"classes": ["a"], "steps": [-1]}}, r"paper_table\.denoising\.steps=-1"),
        ({"denoising": {"classs": ["a"]}}, "'classs' is unknown"),
        ({"grid": {"dataset": ["digits"]}}, "paper_table.grid.ipc is missing"),
        (where({"ipc": 1, "pool": 2}, as_list=False), r"paper_table\.rows\.a\.where must list"),
        (where({"dataset": "nette", "pool": 2}), r"rows\.a\.where\.dataset='nette' is unknown"),
        (where({"ipc": [1, 5], "pool": 2}), r"rows\.a\.where\.ipc='5' is unknown"),
        (where({"pool": 2}), "must name a dataset, an ipc or both"),
        (where({"ipc": 1}), "and what to set there"),
        (where({"ipc": 1, "seed": 0, "pool": 2}), "where: seed is of a whole row"),
        (where({"ipc": 1, "protocol": "soft_label"}), "where: protocol is of a whole row"),
        (where({"ipc": 1, "backbone.weights": "a"}), "backbone.weights is of a whole row"),
        (where({"ipc": 1, "students": {}}), "where: students is of a whole row"),
        (where({"ipc": 1, "guidance.scale": 1}) | {"sweep": "guidance.scale"}, "whole row; set it"),
    ],
)
def test_slips_in_a_table_of_ones_own_are_named(change, message):
    whole = {
        "caption": "c",
        "rows": {"a": {"method": "mgd3"}},
        "grid": {"dataset": ["digits"], "ipc": [1], "seed": [0]},
    }
    with pytest.raises(UserError, match=message):
        read_table(whole | change)


def test_filters_keep_what_they_name():
    found = grid_of("table1", row=["DiT", "DiT+MGD3"], ipc=["10"], seed=["0", "2"]).jobs
    assert {(j.row, j.dataset, j.ipc, j.seed) for j in found} == set(
        product(["DiT", "DiT+MGD3"], ["imagenette", "imageidc"], ["10"], [0, 2])
    )


def test_tables_share_their_runs():
    """Table 5's MGD3 sets and students are Table 1's: the same folders."""
    one, five = (
        {
            (p.job.seed): p.folder
            for p in grid_of(name, row=[row], ipc=["10"]).located
            if p.job.dataset == "imagenette"
        }
        for name, row in (("table1", "DiT+MGD3"), ("table5", "+ stop guidance"))
    )
    assert one == five and len(one) == 3


def test_a_table_keeps_ours_and_the_papers_apart():
    cells = [
        cell("A", [60, 62, 64], paper=(66.4, 2.4), band=(61.5, 68.8)),
        cell("A", [], paper=(71.2, None), ipc="20"),
        cell("B", [50, 50], paper=(55.0, 1.0), band=(54, 56)),
        cell("B", [], ipc="full"),
        cell("C", [], paper=(1.0, 0.1), asked=0),
    ]
    table = PaperComparison(title="T", cells=cells, errata={"B": "a slip", "table": "of all"})
    assert table.matrix().headers == ["method", "ipc 10", "ipc 20", "ipc full"]
    assert table.matrix().texts() == [
        ["A", "62.0 ± 1.6 (3) / 66.4 ± 2.4", "71.2", ""],
        ["B [1]", "50.0 ± 0.0 (2) / 55.0 ± 1.0", "", ""],
        ["C", "1.0 ± 0.1", "", ""],
    ]
    assert table.matrix().lines[0][1] == (
        Span("62.0 ± 1.6", "ours"), Span(" (3)"), Span(" / "), Span("66.4 ± 2.4", "paper"),
    )  # fmt: skip
    assert "| A | **62.0 ± 1.6** (3) / *66.4 ± 2.4* | *71.2* |  |" in table.markdown()
    details = [
        dict(zip(table.details().headers, line, strict=True)) for line in table.details().lines
    ]
    assert [(d["n"], d["best - paper"], d["band"], d["last"]) for d in details] == [
        ("3", "-4.4", "inside 61.5 to 68.8", "61.0 ± 1.6"),
        ("2 of 3", "-5.0", "outside 54 to 56", "49.0 ± 0.0"),
    ]
    notes = table.remarks_and_notes()
    assert "[1] a slip" in notes and "of all" in notes
    assert any("1 cells have fewer students than asked for" in n for n in notes)
    records = list(csv.DictReader(io.StringIO(table.csv())))
    assert [(r["ours_best_mean"], r["paper_mean"]) for r in records[:2]] == [
        ("62.0", "66.4"),
        ("", "71.2"),
    ]
    latex = table.latex()
    assert r"\textbf{62.0 $\pm$ 1.6} (3) / \textit{66.4 $\pm$ 2.4}" in latex
    assert latex.count("&") == 3 * 4 and r"\bottomrule" in latex


def test_what_does_not_belong_together_is_flagged():
    mixed = [cell("A", [60], commit="one"), cell("B", [50], commit="two", protocol="another")]
    one_row = [cell("A", [60]), cell("A", [60], ipc="20", protocol="another")]
    assert "Warning: several protocols stand in one row: p, another" in " ".join(
        PaperComparison(title="T", cells=one_row).remarks_and_notes()
    )
    notes = " ".join(PaperComparison(title="T", cells=mixed).remarks_and_notes())
    assert "Warning: several protocols" not in notes, "rows may have their own"
    assert "Warning: rows of 2 commits stand here: one, two" in notes


@pytest.mark.parametrize(
    ("ours", "theirs", "by", "verdict"),
    [
        ([60, 61, 63], [50, 51, 52], 3, "holds"),
        ([60, 61, 63], [59, 60, 61], 3, "does not hold"),
        ([60, 61, 62], [40, 75, 60], 0, "not established"),
        ([60], [50], 0, "needs more seeds"),
        ([60, 61, 62], [50, 51, 52], 3, "needs more seeds"),  # no pair differs from another
    ],
)
def test_orderings(ours, theirs, by, verdict):
    claims = [{"more": "A", "than": "B", "by": by}, {"more": "A", "than": "B", "ipc": 50}]
    table = PaperComparison(title="T", cells=[cell("A", ours), cell("B", theirs)], claims=claims)
    (line,) = table.orderings().lines
    assert line[-1] == verdict


def test_means_of_students_need_all_of_them():
    rows = [
        row(student=s, seed=seed, best=best, last=best)
        for s, seed, best in (("a", 0, 10), ("b", 0, 30), ("a", 1, 50))
    ]
    (only,) = averaged(rows, ["a", "b"])
    assert (only.student, only.top1_best, only.distill_seed) == (MEAN, 20, 0)

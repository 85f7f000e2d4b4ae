"""Every number that the tables print as the paper's against a transcription of the paper."""

from itertools import product
from pathlib import Path

import pytest
import yaml

from mgd3.config.grid import Experiment, paper_files
from mgd3.config.identity import register

PRINTED, OF_THE_FIELD = (
    yaml.safe_load(Path(__file__).with_name(f"printed_{name}.yaml").read_text())
    for name in ("tables", "field")
)
CELLS = {f"table{n}": count for n, count in enumerate((54, 33, 20, 45, 9, 8, 6, 111, 33, 8), 1)}
OF_MINIMAX = 15  # cells of its own table that stand in Table 8
# What a figure shows beside the tables' numbers: its errata say whose they are.
ELSEWHERE = {
    ("SD+MGD3", "imagenet1k", "50", "resnet18_bn"): (58.5, None),
    ("DiT+MGD3", "imagenet1k", "10", "resnet18_bn"): (45.6, 0.1),
    ("MinMaxDiff", "imagenet1k", "10", "resnet18_bn"): (44.3, 0.5),
    ("MinMaxDiff", "imagenet1k", "50", "resnet18_bn"): (58.6, 0.3),
}


@pytest.fixture(scope="module", autouse=True)
def _schemas():
    register()


def printed(name):
    """Mean and std by row and column, as the paper prints them."""
    table = PRINTED[name]
    if "classes" in table:
        columns = [(c,) for c in table["classes"]]
    else:
        columns = [
            (dataset, str(ipc), student)
            for dataset, ipcs in table["columns"].items()
            for ipc, student in product(ipcs, table["students"])
        ]
    found = {}
    for row, line in table["rows"].items():
        for column, word in zip(columns, line.split(), strict=True):
            mean, _, std = word.partition("±")
            if word != "-":
                found[(row, *column)] = float(mean), float(std) if std else None
    return found


def published(name):
    """The same of a file below configs/paper."""
    file = name if "/" in name else f"mgd3/{name}"
    table = Experiment(file, ["dataset.root=x"]).table
    found = {
        (row, class_name): (value, None)
        for row, by_class in table.published_diversity.items()
        for class_name, value in by_class.items()
    }
    for row, datasets in table.published.items():
        for dataset, ipcs in datasets.items():
            for ipc, students in ipcs.items():
                for student, (mean, std) in students.items():
                    found[row, dataset, str(ipc), student] = mean, std
    return found


@pytest.mark.parametrize("name", CELLS)
def test_every_cell_is_the_papers(name):
    """At its place, and nothing stands where the paper prints nothing."""
    expected = printed(name)
    assert len(expected) == CELLS[name]
    if name == "table8":
        of_minimax = printed("table8_minimax")
        assert len(of_minimax) == OF_MINIMAX and not set(of_minimax) & set(expected)
        expected |= of_minimax
    assert published(name) == expected


def test_all_tables_are_compared():
    assert [n for n in paper_files() if n.startswith("mgd3/table")] == [
        f"mgd3/{name}" for name in CELLS
    ]
    assert sum(CELLS.values()) == 327


def test_the_second_papers_rows_are_gu_et_als_alone():
    """Its own numbers could not be had; those beside them are in MGD3's Tables 1 and 8, too."""
    of_gu = {
        (*key, *value) for name in ("table1", "table8") for key, value in published(name).items()
    }
    for number in (1, 2, 3):
        table = Experiment(f"self_adaptive_memory/table{number}", ["dataset.root=x"]).table
        cells = {
            (row, dataset, str(ipc), student, *value)
            for row, datasets in table.published.items()
            for dataset, ipcs in datasets.items()
            for ipc, students in ipcs.items()
            for student, value in students.items()
        }
        assert cells and "Self-adaptive memory" not in table.published
        assert cells <= of_gu and "Gu et al." in table.errata["table"]


def test_figures_repeat_the_tables_or_say_whose_numbers_theirs_are():
    of_tables = {(*key[1:], *value) for name in CELLS for key, value in printed(name).items()}
    elsewhere = {}
    for name in (n.removeprefix("mgd3/") for n in paper_files() if n.startswith("mgd3/figure")):
        for key, value in published(name).items():
            if (*key[1:], *value) not in of_tables:
                elsewhere[key] = value
                errata = Experiment(f"mgd3/{name}", ["dataset.root=x"]).table.errata
                assert f"{value[0]:g}" in errata[key[0]]
    assert elsewhere == ELSEWHERE


# Rows of the field's tables that MGD3's tables print, by what these call them, and where.
CALLED = {
    "D4M": {"DiT+D4M", "D4M"},
    "D4M on Stable Diffusion": {"D4M"},
    "MGD3": {"DiT+MGD3", "DiT+MGD3 (hard label)", "DiT+MGD3 (soft label)"},
    "MGD3 on a fine-tuned DiT": {"DiT-woofFT+MGD3"},
}
FIELD = {  # cells by file: all, and those that stand in the tables or figures of MGD3
    "field/table1": (156, 104), "field/table2": (124, 0), "field/table3": (81, 17),
}  # fmt: skip

OTHER_FAMILIES = {  # than the table's, of rows that stand in it all the same
    "field/table1": {"CoDA": "unlisted"},
    "field/table3": {
        "D3HR": "soft_d3", "D4M on Stable Diffusion": "soft_fkd", "VLCP": "soft_500",
        "CoDA": "unlisted", "FullDataset": "unlisted",
    },
}  # fmt: skip


def of_the_field(name):
    """Mean and std by row and column, as transcribed."""
    table, found = OF_THE_FIELD[name], {}
    for row, datasets in table["rows"].items():
        for dataset, ipcs in datasets.items():
            for ipc, line in ipcs.items():
                for student, word in zip(table["students"], line.split(), strict=True):
                    mean, _, std = word.partition("±")
                    if word != "-":
                        value = float(mean), float(std) if std else None
                        found[row, dataset, str(ipc), student] = value
    return found


@pytest.mark.parametrize("name", FIELD)
def test_the_fields_cells_are_transcribed_here_or_stand_in_mgd3s_tables(name):
    """A cell of MGD3's is printed there of the same method, place and student, to the digit."""
    here, own = published(name), of_the_field(name)
    assert {key: here[key] for key in own} == own
    known = {}
    for file in (*CELLS, "figure4"):
        for key, value in published(file).items():
            if len(key) == 4:  # accuracies
                known.setdefault((*key[:3], key[3].removesuffix("_bn")), []).append(value)
    others = {key: value for key, value in here.items() if key not in own}
    for (row, dataset, ipc, student), value in others.items():
        names = CALLED.get(row, {row})
        at = dataset, ipc, student.removesuffix("_bn")
        found = [v for n in names for v in known.get((n, *at), [])]
        assert value in found, (row, dataset, ipc, student)
    assert (len(here), len(others)) == FIELD[name]
    table = Experiment(name, ["dataset.root=x"]).table
    other = {row: table.family_of(row) for row in table.published if table.names_family(row)}
    assert other == OTHER_FAMILIES.get(name, {})

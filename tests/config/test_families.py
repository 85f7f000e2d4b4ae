"""Published accuracies of one evaluator family are never held against ours of another."""

from dataclasses import replace

import pytest
from support import cell, composed

from eval.protocols.recipe import Recipe
from eval.reports.comparison import PaperComparison
from eval.reports.drawings.curves import _ours_and_papers
from mgd3.config.build import build_protocol
from mgd3.config.families import evaluator_family, refuse_mixed_families
from mgd3.config.grid import Experiment, paper_files
from mgd3.config.paper import FAMILIES, read_table
from mgd3.config.schema import composed as composed_whole
from mgd3.config.schema import plain
from mgd3.runtime.errors import UserError

TABLE = {
    "caption": "c",
    "rows": {"DiT": {"method": "unguided"}},
    "grid": {"dataset": ["imagewoof"], "ipc": [10], "seed": [0]},
    "published": {"DiT": {"imagewoof": {10: {"resnetap10": [34.7, 0.5]}}}},
}


@pytest.mark.parametrize(
    ("protocol", "family"),
    [
        ("hard_label", "hard_sgd"),
        ("hard_label_adamw", "hard_adamw"),
        ("hard_label protocol.optimization.optimizer=adamw", "hard_adamw"),
        ("mgd3_hard", "hard_sgd"),
        ("idc", "hard_idc"),
        ("soft_label", "soft_rded"),
        ("soft_label_fkd", "soft_fkd"),
        ("hard_label_short", None),  # rehearsals compare with nothing
        ("hard_label_noaug", None),
        ("soft_label_short", None),
    ],
)
def test_a_protocol_says_of_which_family_it_is(protocol, family):
    cfg = composed(*f"protocol={protocol}".split())
    assert evaluator_family(cfg) == family
    assert family is None or family in FAMILIES
    assert isinstance(build_protocol(cfg).recipe(10, 10, "convnet2_w8"), Recipe)


@pytest.mark.parametrize("name", paper_files())
def test_every_published_accuracy_is_of_a_family(name):
    table = read_table(plain(composed_whole(f"paper={name}", name="reproduce").paper_table))
    for row in table.published:
        assert table.family_of(row) in FAMILIES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, r"published\.DiT has no evaluator family.*Allowed|allowed: hard_sgd"),
        ({"family": {"DiT ": "hard_sgd"}}, "a row of the table='DiT ' is unknown"),
        ({"family": "sgd"}, r"paper_table\.family='sgd' is unknown.*Allowed: hard_sgd, hard_adamw"),
        ({"family": {"DiT": "x"}}, r"paper_table\.family of row DiT='x' is unknown"),
        ({"rows": TABLE["rows"] | {"B": {}}, "family": {"B": "hard_sgd"}},
         r"published\.DiT has no evaluator family"),
    ],
)  # fmt: skip
def test_a_published_value_without_a_family_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        read_table(TABLE | change)


def test_a_table_that_mixes_families_without_saying_so_is_refused():
    """Table 10's rows have protocols of their own: each must name its numbers' family."""
    node = plain(composed_whole("paper=mgd3/table10", name="reproduce").paper_table)
    refuse_mixed_families(read_table(node), "mgd3/table10")
    soft = "DiT+MGD3 (soft label)"
    silent = read_table(node | {"family": "hard_sgd"})
    message = rf"row {soft[:4]}.* is scored under soft_rded \(protocol=soft_label\).*hard_sgd"
    with pytest.raises(UserError, match=message.replace("+", r"\+")):
        refuse_mixed_families(silent, "mgd3/table10")
    said = read_table(node | {"family": {"table": "hard_sgd", soft: "soft_rded"}})
    refuse_mixed_families(said, "mgd3/table10")


def test_an_overridden_protocol_moves_our_rows_to_its_family():
    sgd, adamw = (
        Experiment("mgd3/table8", ["dataset.root=x", *more], {"row": ["DiT"], "ipc": ["10"]})
        for more in ((), ("protocol=hard_label_adamw",))
    )
    assert sgd.families() == {"DiT": "hard_sgd"}
    assert adamw.families() == {"DiT": "hard_adamw"}
    assert adamw.table.family_of("DiT") == "hard_sgd"  # what is printed stays what it is


def woof(row, printed, family, ours="hard_adamw", **more):
    """DiT on ImageWoof, ResNetAP-10, IPC 10: 34.7 is printed under SGD, 39.0 under AdamW."""
    kept = cell(row, [39.5, 38.5, 39.0], paper=(printed, 0.9), **more)
    return replace(kept, family=family, our_family=ours)


def test_ours_are_held_against_their_own_family_alone():
    under_adamw = woof("DiT (DAP)", 39.0, "hard_adamw", band=(38, 40))
    under_sgd = woof("DiT (Minimax)", 34.7, "hard_sgd", band=(34, 36))
    assert under_adamw.difference == pytest.approx(0.0)
    assert under_adamw.verdict == "inside 38 to 40"
    assert (under_sgd.difference, under_sgd.verdict) == (None, "")
    claims = [{"more": "DiT (DAP)", "than": "DiT (Minimax)"}]
    table = PaperComparison(
        title="T", cells=[under_adamw, under_sgd], claims=claims, families=FAMILIES
    )
    assert table.matrix().headers == ["method", "family", "top-1"]
    assert [line[:2] for line in table.matrix().texts()] == [
        ["DiT (DAP)", "hard_adamw"],
        ["DiT (Minimax)", "hard_sgd; ours hard_adamw"],
    ]
    assert "39.0 ± 0.4 (3) / 34.7 ± 0.9" in table.matrix().texts()[1]  # both stand, uncompared
    assert table.orderings().lines[0][-1] == "of another family"
    notes = " ".join(table.remarks_and_notes())
    assert "Printed under hard_adamw: hard labels, AdamW lr 1e-3: IGD, DMGD, DAP, LGD." in notes
    assert (
        "Row DiT (Minimax): the paper's numbers are of the evaluator family hard_sgd, ours of "
        "hard_adamw; they are not compared."
    ) in notes
    found = [(r["difference"], r["band"], r["family"], r["our_family"]) for r in table.records()]
    assert found == [
        (0.0, "inside 38 to 40", "hard_adamw", "hard_adamw"),
        (None, None, "hard_sgd", "hard_adamw"),
    ]


def test_one_family_is_said_once():
    table = PaperComparison(
        title="T", cells=[woof("A", 34.7, "hard_sgd", "hard_sgd")], families=FAMILIES
    )
    assert table.matrix().headers == ["method", "top-1"]
    assert [n for n in table.remarks_and_notes() if n.startswith("Printed under")] == [
        f"Printed under hard_sgd: {FAMILIES['hard_sgd']}."
    ]


def test_pictures_leave_out_what_does_not_compare():
    rows = [woof("A", 39.0, "hard_adamw"), woof("B", 34.7, "hard_sgd")]
    ours, paper = _ours_and_papers(rows, "o")
    assert [at for at, _, _ in ours[2]] == [0, 1]
    assert paper[2] == [(0, 39.0, 0.9)]


def test_a_table_of_ones_own_without_published_values_needs_no_family():
    table = read_table({k: v for k, v in TABLE.items() if k != "published"})
    assert table.family_of("DiT") is None

"""DD-Ranking's scores against arithmetic by hand, and scripts/compare.py on result files."""

import math
import runpy

import pytest
from conftest import ROOT, run
from support import row

from eval.results.robustness import augmentation_robust_score, fairness, label_robust_score
from eval.results.rows import ResultStore
from mgd3.runtime.errors import UserError

SCRIPT = str(ROOT / "scripts/compare.py")


def scored(method, protocol, last, **other):
    """A row under a protocol; cells of one method and place differ by `configuration`."""
    configuration = other.pop("configuration", "")
    cell = f"{method}-{protocol}-{other.get('ipc', 10)}{configuration}"
    soft, bare = protocol.startswith("soft_label"), protocol.endswith("_noaug")
    fields = {"labels": "soft" if soft else "hard", "augmented": not bare, "cell_id": cell}
    return row(method, protocol=protocol, last=last, **{**fields, **other})


# Accuracies of all arms in percent: every score can be computed from these.
WHOLE = [
    scored("full", "hard_label", 90.0, ipc=180, epochs=30),
    scored("mgd3", "hard_label", 60.0),
    scored("random", "hard_label", 50.0),
    scored("mgd3", "hard_label_noaug", 45.0),
    scored("random", "hard_label_noaug", 25.0),
    scored("mgd3", "soft_label", 80.0, teacher="resnet18"),
    scored("random", "soft_label", 84.0, teacher="resnet18"),
]


def normalised(x):
    return (math.exp(x) - math.exp(-1)) / (math.e - math.exp(-1))


def without(*cells):
    return [r for r in WHOLE if (r.method, r.protocol) not in cells]


def by_protocol(rows, **options):
    return {f.cell.protocol: f for f in fairness(rows, **options)}


def test_label_robust_score_fills_the_unit_interval():
    assert label_robust_score(hlr=1, ior=-1) == 0  # alpha = -1
    assert label_robust_score(hlr=-1, ior=1) == 1  # alpha = 1
    assert label_robust_score(hlr=0, ior=0) == pytest.approx((1 - 1 / math.e) / 2.3504024)
    steps = [label_robust_score(hlr=-k / 10, ior=k / 10) for k in range(-10, 11)]
    assert steps == sorted(steps)
    assert label_robust_score(hlr=0.3, ior=0.1, w=1) == pytest.approx(normalised(0.1))
    assert label_robust_score(hlr=0.3, ior=0.1, w=0) == pytest.approx(normalised(-0.3))
    assert augmentation_robust_score(-1, -1) == 0
    assert augmentation_robust_score(0.2, 0.4, g=0.75) == pytest.approx(normalised(0.25))


def test_scores_by_hand_under_hard_and_soft_labels():
    found = by_protocol(WHOLE)
    assert found.keys() == {"hard_label", "soft_label"}  # no references, no half of an ARS
    hard, soft = found["hard_label"], found["soft_label"]
    assert (hard.hlr, hard.ior) == pytest.approx((0.3, 0.1))
    assert hard.lrs == pytest.approx(normalised(0.5 * 0.1 - 0.5 * 0.3))
    assert hard.ars == pytest.approx(normalised(0.5 * 0.1 + 0.5 * 0.2))
    assert hard.missing == ()
    assert (soft.hlr, soft.ior) == pytest.approx((0.3, -0.04))  # hlr is of the hard-label cells
    assert soft.lrs == pytest.approx(normalised(0.5 * -0.04 - 0.5 * 0.3))
    assert (soft.ars, soft.missing) == (
        None,
        ("ARS: mgd3 without augmentation, soft labels, 3 epochs",),
    )
    weighed = by_protocol(WHOLE, w=0.2, g=1.0)["hard_label"]
    assert weighed.lrs == pytest.approx(normalised(0.2 * 0.1 - 0.8 * 0.3))
    assert weighed.ars == pytest.approx(normalised(0.1))


def test_accuracies_are_means_over_students_of_the_metric_asked_for():
    more = [scored("mgd3", "hard_label", 70.0, best=90.0, student_seed=1)]
    assert by_protocol(WHOLE + more)["hard_label"].ior == pytest.approx(0.65 - 0.50)
    best = by_protocol(WHOLE + more, metric="top1_best")["hard_label"]
    assert best.ior == pytest.approx(0.75 - 0.60)


@pytest.mark.parametrize(
    ("rows", "protocol", "scores", "missing"),
    [
        (
            without(("full", "hard_label")),
            "hard_label",
            {"ior", "ars"},
            "HLR, LRS: «full» under a hard-label protocol",
        ),
        (
            without(("random", "hard_label")),
            "hard_label",
            {"hlr"},
            "IOR, LRS, ARS: «random» under hard_label",
        ),
        (
            without(("random", "hard_label_noaug")),
            "hard_label",
            {"hlr", "ior", "lrs"},
            "ARS: «random» under hard_label_noaug",
        ),
        (
            without(("mgd3", "hard_label")),
            "soft_label",
            {"ior"},
            "HLR, LRS: mgd3 under a hard-label protocol",
        ),
        (
            without(("mgd3", "hard_label")),
            "hard_label_noaug",
            {"ior"},
            "ARS: mgd3 with augmentation, hard labels, 3 epochs",
        ),
    ],
)
def test_what_is_missing_is_said_and_blocks_no_other_score(rows, protocol, scores, missing):
    found = by_protocol(rows)[protocol]
    assert {s for s in ("hlr", "ior", "lrs", "ars") if getattr(found, s) is not None} == scores
    assert missing in found.missing


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"epochs": 9}, " scored alike (its epochs: 9, not 3)"),
        ({"teacher": "resnet50"}, " scored alike (its teacher: resnet50, not resnet18)"),
        ({"teacher": "resnet18", "test_images": 5}, " scored alike (its test images: 5, not 719)"),
        ({"teacher": "resnet18", "ipc": 20}, ""),
        ({"teacher": "resnet18", "student": "resnet18"}, ""),
        ({"teacher": "resnet18", "dataset": "imagenette"}, ""),
    ],
)
def test_random_of_another_recipe_is_not_the_reference(other, why):
    options = {"teacher": "resnet18"} | other
    rows = [*without(("random", "soft_label")), scored("random", "soft_label", 1.0, **options)]
    found = by_protocol(rows)["soft_label"]
    assert (found.ior, found.lrs) == (None, None)
    assert any(
        m.startswith(f"IOR, LRS, ARS: «random» under soft_label{why}") for m in found.missing
    )


def test_full_matches_by_labels_and_prefers_the_same_protocol():
    hard_only = [scored("mgd3", "hard_label", 60.0), scored("mgd3", "soft_label", 80.0)]
    long = scored("full", "hard_label_long", 95.0, ipc=180)
    same = scored("full", "hard_label", 90.0, ipc=180)
    soft = scored("full", "soft_label", 99.0, ipc=180)
    bare = scored("full", "hard_label_noaug", 70.0, ipc=180)
    others = [soft, bare, scored("full", "hard_label", 99.0, ipc=180, student="resnet18")]
    for full, expected in [([long], 0.35), ([long, same], 0.30), ([], None)]:
        found = by_protocol([*hard_only, *full, *others])
        assert found["hard_label"].hlr == pytest.approx(expected)
        assert found["soft_label"].hlr == pytest.approx(expected)


def test_augmentation_is_all_that_both_halves_differ_in():
    """As the presets are: hard_label_noaug has the epochs of hard_label_short, not hard_label's."""
    long = [scored("mgd3", "hard_label", 60.0, epochs=20), *without(("mgd3", "hard_label"))]
    found = by_protocol(long)
    assert "ARS: mgd3 without augmentation, hard labels, 20 epochs" in found["hard_label"].missing
    assert "ARS: mgd3 with augmentation, hard labels, 3 epochs" in found["hard_label_noaug"].missing
    short = [scored("mgd3", "hard_label_short", 55.0), scored("random", "hard_label_short", 50.0)]
    found = by_protocol(long + short)
    assert "hard_label_noaug" not in found
    assert found["hard_label_short"].ars == pytest.approx(normalised(0.5 * 0.05 + 0.5 * 0.2))
    second = [scored("mgd3", "another_noaug", 40.0)]
    found = by_protocol(long + short + second)
    assert found["hard_label_short"].missing == (
        "ARS: one configuration of mgd3 without augmentation, hard labels, 3 epochs (there are 2)",
    )


def test_roles_and_labels_are_fields_not_names():
    rows = [
        scored("all_of_it", "p", 90.0, ipc=180, role="full"),
        scored("seeded", "p", 50.0, role="random"),
        scored("full", "p", 60.0, role=None),
        scored("full", "q", 80.0, role=None, labels="soft"),
        scored("full", "r", 40.0, role=None, augmented=False),
        scored("seeded", "r", 30.0, role="random", augmented=False),
    ]
    hard, soft = fairness(rows)
    assert hard.cell.protocol == "p"
    assert (hard.hlr, hard.ior) == pytest.approx((0.3, 0.1))
    assert hard.ars == pytest.approx(normalised(0.1))
    assert (soft.cell.protocol, soft.hlr) == ("q", pytest.approx(0.3))


def test_scores_on_other_test_images_are_no_reference():
    rows = [scored("mgd3", "hard_label", 60.0, test_data="b")]
    rows += [r for r in WHOLE if r.method in ("random", "full")]
    (found,) = fairness(rows)
    assert (found.hlr, found.ior) == (None, None)


@pytest.mark.parametrize("other", [{"ipc": 20}, {"dataset": "imagenette"}, {"student": "resnet18"}])
def test_a_method_elsewhere_lends_no_hard_label_cell(other):
    elsewhere = scored("mgd3", "hard_label", 60.0, **other)
    found = by_protocol([*without(("mgd3", "hard_label")), elsewhere])["soft_label"]
    assert "HLR, LRS: mgd3 under a hard-label protocol" in found.missing


def test_full_tested_on_other_images_is_not_the_reference():
    full = scored("full", "hard_label", 90.0, ipc=180, test_images=5)
    found = by_protocol([*without(("full", "hard_label")), full])["hard_label"]
    assert (found.hlr, found.lrs) == (None, None)
    assert found.missing == (
        "HLR, LRS: «full» under hard_label scored alike (its test images: 5, not 719)",
    )


def test_nothing_is_guessed_where_names_leave_a_choice():
    second = [scored("mgd3", "hard_label", 10.0, configuration="b")]
    first_of_two, other, soft = fairness(WHOLE + second)
    assert (first_of_two.hlr, other.hlr) == pytest.approx((0.3, 0.8))  # their own cells
    assert "ARS: one configuration of mgd3 under hard_label (there are 2)" in other.missing
    assert soft.hlr is None
    assert "HLR, LRS: one hard-label cell each of «full» and mgd3 (there are 1 and 2)" in (
        soft.missing
    )
    randoms = [scored("random", "hard_label", 10.0, configuration="b")]
    missing = by_protocol(WHOLE + randoms)["hard_label"].missing
    assert "IOR, LRS, ARS: one configuration of «random» under hard_label (there are 2)" in missing
    twins = [scored("mgd3", "soft_label", 10.0, teacher="resnet18", configuration="b")]
    softs = [f for f in fairness(WHOLE + twins) if f.cell.protocol == "soft_label"]
    assert [f.hlr for f in softs] == [None, None]
    assert [f.ior for f in softs] == pytest.approx([-0.04, -0.74])


@pytest.fixture
def runs(tmp_path):
    """Two folders: three sets of one method; three of another, and the full set."""
    for seed, last in enumerate((60.0, 62.0, 67.0)):
        for method, shift in (("mgd3", 0.0), ("random", -10.0 - seed)):
            path = tmp_path / ("ours" if method == "mgd3" else "theirs") / f"seed{seed}"
            store = ResultStore(path / "results.jsonl")
            for t in (0, 1):
                values = {"seed": seed, "student_seed": t, "best": 90.0 + t}
                store.append(scored(method, "hard_label", last + shift + t, **values))
    full = scored("full", "hard_label", 90.0, ipc=180, dataset_note="a re-split")
    ResultStore(tmp_path / "theirs/full/results.jsonl").append(full)
    return tmp_path


def test_the_script_prints_three_tables(runs):
    done = run(runs, "folders=[ours,theirs,theirs/seed0]", script=SCRIPT)
    assert done.returncode == 0, done.stderr
    words = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "top1_last, digits, hard_label, convnet3" in words
    assert "10 mgd3 63.5 [54.5, 72.5] 3.0 3.3 3.6 0.7 6 3" in words
    assert "180 full 90.0 – – – – – 1 1" in words
    assert "mgd3 random +11.0 [+8.5, +13.5] 3 paired 7" in words
    assert "mgd3 +0.265 +0.110 0.237 ARS: mgd3 without augmentation, hard labels, 3 epochs" in words
    assert "Note: a re-split." in done.stdout


def test_the_script_writes_markdown_of_the_best_test(runs):
    options = ("best=true", "markdown=tables/out.md")
    done = run(runs, "folders=[ours,theirs]", *options, script=SCRIPT)
    text = (runs / "tables/out.md").read_text()
    assert "**top1_best, digits, hard_label, convnet3**" in text
    assert "| 10 | mgd3 | 90.5 | [90.5, 90.5] | 0.5 | 0.5 | 0.0* | 0.7 | 6 | 3 |" in text
    assert "| mgd3 | random | +0.0 [–] | 3 | paired |" in text
    assert "ARS: mgd3 without augmentation, hard labels, 3 epochs |" in text
    assert "top1_best, digits" in done.stdout


def test_runs_that_disagree_are_refused(runs):
    again = scored("mgd3", "hard_label", 60.0, best=90.0, train_seconds=9.0, commit="later")
    ResultStore(runs / "same/results.jsonl").append(again)  # another run of the same student
    changed = scored("mgd3", "hard_label", 1.0, seed=1)
    ResultStore(runs / "other/deep/results.jsonl").append(changed)
    done = run(runs, "folders=[same,ours,other]", script=SCRIPT)
    assert done.returncode == 1
    assert done.stderr.endswith(
        "error: ours/seed1 and other/deep disagree on mgd3, convnet3, seeds 1/0; "
        "leave one of them out\n"
    )


@pytest.mark.parametrize(
    ("folder", "why"), [("nowhere", "is not a folder"), ("empty", "holds no finished run")]
)
def test_folders_without_results_are_named(runs, folder, why):
    (runs / "empty").mkdir()
    read_runs = runpy.run_path(SCRIPT)["read_runs"]
    with pytest.raises(UserError, match=f"{folder} {why}"):
        read_runs([runs / "ours", runs / folder])

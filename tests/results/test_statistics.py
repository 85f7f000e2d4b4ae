"""Variance components and differences against arithmetic by hand, scipy and known truths."""

import numpy as np
import pytest
from scipy.stats import f_oneway, t, ttest_1samp, ttest_ind, ttest_rel
from support import row

from eval.results.cells import cells
from eval.results.statistics import (
    compare,
    components,
    components_layout,
    differences_layout,
    scores_by_set,
    seeds_for,
    units,
)

BALANCED = {0: [50.0, 52.0], 1: [54.0, 56.0], 2: [58.0, 60.0]}
UNBALANCED = {0: [10.0, 12.0, 14.0], 1: [20.0], 2: [15.0, 17.0]}


def drawn(sizes, distillation_std, student_std, seed=0):
    """Scores of sets of these sizes from the model y = 60 + d + s."""
    draw = np.random.default_rng(seed)
    return {
        i: (60 + draw.normal(0, distillation_std) + draw.normal(0, student_std, size)).tolist()
        for i, size in enumerate(sizes)
    }


def test_balanced_components_by_hand():
    """Mean squares: within 6/3 = 2, between 2 (16 + 0 + 16)/2 = 32; (32 - 2)/2 = 15."""
    found = components(BALANCED)
    assert (found.mean, found.n, found.sets, found.clipped) == (55, 6, 3, False)
    assert found.student_std == pytest.approx(2**0.5)
    assert found.distillation_std == pytest.approx(15**0.5)
    values = np.array([50, 52, 54, 56, 58, 60])
    assert found.std_population == pytest.approx(np.std(values))
    assert found.std_sample == pytest.approx(np.std(values, ddof=1))
    expected = ttest_1samp([51, 55, 59], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_unbalanced_components_by_hand():
    """Within 10/3, between 80/3; sizes 3, 1, 2 count as (6 - 14/6)/2 = 11/6 students a set."""
    found = components(UNBALANCED)
    assert found.student_std == pytest.approx((10 / 3) ** 0.5)
    assert found.distillation_std == pytest.approx((140 / 11) ** 0.5)
    assert found.mean == pytest.approx(88 / 6)
    expected = ttest_1samp([12, 20, 16], 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_components_have_scipys_f_ratio():
    """F = 1 + n0 times the ratio of the two variances, whatever the sizes."""
    sizes = [2, 5, 1, 3, 4]
    scores = drawn(sizes, 3.0, 1.0)
    found = components(scores)
    n0 = (15 - sum(s * s for s in sizes) / 15) / 4
    ratio = (found.distillation_std / found.student_std) ** 2
    assert 1 + n0 * ratio == pytest.approx(f_oneway(*scores.values()).statistic)


@pytest.mark.parametrize("truth", [(2.0, 1.0), (0.5, 2.0)])
@pytest.mark.parametrize("sizes", [[3], [1, 2, 5]], ids=["balanced", "unbalanced"])
def test_known_components_come_back(truth, sizes):
    found = components(drawn(sizes * 3000, *truth))
    assert (found.distillation_std, found.student_std) == pytest.approx(truth, rel=0.07)
    assert found.low < 60 < found.high


def test_the_interval_holds_the_truth_as_often_as_it_says():
    held = 0
    for seed in range(2000):
        found = components(drawn([2] * 5, 2.0, 1.0, seed))
        held += found.low < 60 < found.high
    assert held / 2000 == pytest.approx(0.95, abs=0.015)  # three standard errors


def test_a_negative_component_is_zero_and_said_so():
    found = components({0: [50.0, 60.0], 1: [51.0, 59.0]})
    assert (found.distillation_std, found.clipped) == (0, True)
    assert found.student_std == pytest.approx(((50 + 32) / 2) ** 0.5)


def test_sets_that_do_not_depend_on_their_seed_are_sets():
    """Their spread over seeds is zero, which the data say, not a rule."""
    found = components({seed: [50.0, 52.0] for seed in range(3)})
    assert (found.distillation_std, found.low, found.high, found.sets) == (0, 51, 51, 3)
    assert found.student_std == pytest.approx(2**0.5)


def test_what_cannot_be_estimated_is_none():
    one_student_a_set = components({0: [50.0], 1: [52.0]})
    assert one_student_a_set.distillation_std is None
    assert one_student_a_set.student_std is None
    assert one_student_a_set.std_sample == pytest.approx(2**0.5)
    assert one_student_a_set.low < 51 < one_student_a_set.high
    one_set = components({3: [50.0, 52.0]})
    assert (one_set.distillation_std, one_set.low, one_set.high) == (None, None, None)
    assert one_set.student_std == pytest.approx(2**0.5)
    one_score = components({0: [50.0]})
    assert (one_score.mean, one_score.std_population, one_score.std_sample) == (50, None, None)
    assert (one_score.student_std, one_score.clipped) == (None, False)


def test_shared_seeds_are_paired_and_others_left_out():
    ours = {0: [50.0, 52.0], 1: [57.0], 2: [60.0, 60.0], 7: [0.0]}
    theirs = {2: [61.0], 0: [50.0], 1: [52.0, 53.0, 54.0], 9: [99.0]}
    found = compare(ours, theirs)
    expected = ttest_rel([51, 57, 60], [50, 53, 61]).confidence_interval(0.95)
    assert found.mean == pytest.approx(4 / 3)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.n, found.paired) == (3, True)
    back = compare(theirs, ours)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


@pytest.mark.parametrize("first", [3, 2], ids=["no shared seed", "one shared seed"])
def test_unshared_seeds_give_welchs_interval(first):
    ours, theirs = [51.0, 57.0, 60.0], [50.0, 40.0, 61.0, 55.0]
    found = compare(
        {seed: [value - 1, value + 1] for seed, value in enumerate(ours)},
        {seed: [value] for seed, value in enumerate(theirs, start=first)},
    )
    expected = ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    assert found.mean == pytest.approx(56 - 51.5)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.n, found.paired) == (7, False)


def test_too_few_sets_have_a_difference_without_an_interval():
    many, one = {0: [50.0], 1: [52.0]}, {1: [51.0, 53.0, 55.0]}
    for ours, theirs, mean, n, paired in (
        (many, one, -1, 1, True),  # on the seed that both have
        (one, many, 1, 1, True),
        (one, {7: [50.0]}, 3, 2, False),
        ({0: [50.0], 1: [50.0]}, {2: [40.0], 3: [40.0]}, 10, 4, False),  # no spread to go by
    ):
        found = compare(ours, theirs)
        assert (found.mean, found.low, found.high) == (mean, None, None)
        assert (found.n, found.paired) == (n, paired)
        assert str(found) == f"{mean:+.1f} [–]"


def test_one_run_each_has_no_spread_and_yet_a_difference():
    rows = [row(last=52.0), row("unguided", last=50.0)]
    table = components_layout(rows)
    shown = dict(zip(table.headers, table.lines[0], strict=True))
    assert (shown["mean"], shown["n"]) == ("52.0", "1")
    spreads = ("95 % interval", "std (n)", "std (n-1)", "distillation std", "student std")
    assert {shown[name] for name in spreads} == {"–"}
    (line,) = differences_layout(rows).lines
    assert line[-4:] == ["+2.0 [–]", "1", "one pair", "–"]


def test_scores_are_one_cells_and_of_the_metric_asked_for():
    rows = [
        row(seed=1, student_seed=1, last=3.0, best=30.0),
        row(seed=1, last=2.0, best=20.0),
        row(seed=0, last=1.0, best=10.0),
        row(cell_id="other", last=9.0),
        row(student="resnet18", last=9.0),
    ]
    cell = cells(rows)[0]
    mine = cell.rows(rows)
    assert scores_by_set(mine) == {0: [1.0], 1: [2.0, 3.0]}
    assert scores_by_set(mine, "top1_best") == {0: [10.0], 1: [20.0, 30.0]}


def test_students_are_the_units_of_a_method_without_seeds():
    """Its set is one: nothing pairs it, and what varies are the students."""
    ours, alone = {0: [50.0, 52.0], 1: [57.0]}, {None: [40.0, 44.0, 45.0]}
    assert (units(ours), units(alone)) == ([51.0, 57.0], [40.0, 44.0, 45.0])
    assert (components(alone).sets, components(alone).n, components(alone).low) == (1, 3, None)
    found = compare(ours, alone)
    expected = ttest_ind([51, 57], [40, 44, 45], equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.n, found.paired) == (5, False)
    assert compare(alone, {None: [41.0, 44.0, 45.0]}).paired is False
    alone = compare(ours, {None: [40.0]})
    assert (alone.mean, alone.low, alone.paired) == (14.0, None, False)
    rows = [row("herding", None, t, last=40.0 + t) for t in range(3)]
    rows += [row(seed=s, last=50.0 + s) for s in range(2)]
    table = components_layout(rows)
    assert [line[table.headers.index("sets")] for line in table.lines] == ["1", "2"]
    ((_, _, _, n, kind, seeds),) = differences_layout(rows).lines
    assert (n, kind, seeds) == ("5", "Welch", "–")


def test_tables_hold_every_cell_and_every_pair_of_one_place():
    rows = [
        row(seed=s, student_seed=t, last=v)
        for s, group in BALANCED.items()
        for t, v in enumerate(group)
    ]
    rows += [row("unguided", seed=s, last=50.0 + 2 * s) for s in (0, 1, 2)]
    rows += [row("random", seed=s, last=40.0 + s) for s in (5, 6)]
    rows += [row("closest_real", last=45.0), row(cell_id="x", ipc=20)]
    table = components_layout(rows)
    assert table.title == "top1_last, digits, p, convnet3"
    mgd3 = dict(zip(table.headers, table.lines[0], strict=True))
    assert mgd3 == {
        "ipc": "10", "method": "mgd3", "mean": "55.0", "95 % interval": "[45.1, 64.9]",
        "std (n)": "3.4", "std (n-1)": "3.7", "distillation std": "3.9", "student std": "1.4",
        "n": "6", "sets": "3",
    }  # fmt: skip
    assert [line[0] for line in table.lines] == ["10", "10", "10", "10", "20"]
    assert table.lines[3][3:] == ["–", "–", "–", "–", "–", "1", "1"]
    pairs = [line[:2] + line[3:] for line in differences_layout(rows).lines]
    assert pairs == [
        ["mgd3", "unguided", "3", "paired", "18"],
        ["mgd3", "random", "5", "Welch", "–"],
        ["mgd3", "closest_real", "1", "one pair", "–"],
        ["unguided", "random", "5", "Welch", "–"],
        ["unguided", "closest_real", "1", "one pair", "–"],
        ["random", "closest_real", "3", "means", "–"],
    ]
    assert differences_layout(rows, within=10).headers[-1] == "n for ±10"
    assert differences_layout(rows).lines[0][2] == "+3.0 [-2.0, +8.0]"


@pytest.mark.parametrize(("within", "std"), [(1.0, 2.06), (5.0, 2.06), (0.5, 7.0), (30.0, 0.1)])
def test_the_least_number_of_seeds_that_an_interval_takes(within, std):
    """Of so many pairs with this spread scipy's interval is within, of one fewer it is not."""
    shape = np.random.default_rng(0).normal(size=10)
    values = 1.5 + std * (shape - shape.mean()) / shape.std(ddof=1)
    found = compare({s: [50 + v] for s, v in enumerate(values)}, {s: [50.0] for s in range(10)})
    n = seeds_for(found, within)
    halves = {
        m: t.interval(0.95, m - 1, scale=std / m**0.5)[1] if m > 1 else np.inf for m in (n - 1, n)
    }
    assert halves[n] <= within < halves[n - 1]


@pytest.mark.parametrize("gap", [0.0, 0.1, 0.3])
def test_pairs_that_differ_by_the_same_have_a_difference_and_no_interval(gap):
    """Two seeds that agree by chance would else make an interval of no width, and a claim hold."""
    ours = {0: [20.0 + gap], 1: [22.7 + gap]}
    found = compare(ours, {0: [20.0], 1: [22.7]})
    assert (found.low, found.high, found.n, found.paired) == (None, None, 2, True)
    assert str(found) == f"+{gap} [–]"

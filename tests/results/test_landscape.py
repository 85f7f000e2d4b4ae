"""Guided minus unguided over three keys: closed forms, the picture, what has nothing beside it."""

import pytest

from eval.reports.drawings.landscape_picture import landscape_picture
from eval.results.landscape import Point, landscape
from mgd3.runtime.errors import UserError

KEYS = ("sampler.cfg_scale", "guidance.stop_t", "guidance.scale")


def points(gain=2.0):
    """Two guidance weights, two seeds; what is gained grows with lambda, one seed is a point up."""
    found = []
    for cfg in (1, 4):
        for seed in (0, 1):
            plain = {"accuracy": 50.0 + cfg + seed, "modes": 3.0}
            found.append(Point(place=(cfg, 25, 0), plain=True, seed=seed, measures=plain))
            for stop_t in (0, 25):
                for scale in (0.1, 0.2):
                    own = {
                        "accuracy": 50.0 + cfg + seed + (gain + seed) * scale,
                        "modes": 3.0 + seed,
                    }
                    place = (cfg, stop_t, scale)
                    found.append(Point(place=place, plain=False, seed=seed, measures=own))
    return found


def test_gains_are_paired_by_seed_within_a_guidance_weight():
    found = landscape(points(), KEYS)
    assert found.measures == ["accuracy", "modes"] and found.sets == 2
    assert found.plain[4, "accuracy"][0] == 54.5
    gain = found.gains[(4, 0, 0.2), "accuracy"]
    assert gain.paired and gain.n == 2
    assert gain.mean == pytest.approx(0.5) and gain.low < 0.4 < 0.6 < gain.high
    modes = found.gains[(1, 25, 0.1), "modes"]
    assert modes.mean == 0.5 and modes.low < 0 < modes.high
    lines = found.layout("map").lines
    assert len(lines) == 2 * (1 + 4)
    assert lines[0] == ["1", "unguided", "unguided", lines[0][3], "3.00"]


def test_the_picture_has_a_panel_for_each_measure_and_weight():
    svg, png = landscape_picture(landscape(points(), KEYS))
    assert svg.count('id="axes_') == 4 and png.startswith(b"\x89PNG")
    assert svg == landscape_picture(landscape(points(), KEYS))[0]


def test_a_panel_has_the_measures_that_all_of_its_sets_have():
    some = points()
    some[0] = Point(place=(1, 25, 0), plain=True, seed=0, measures={"modes": 3.0})
    found = landscape(some, KEYS)
    assert found.measures == ["accuracy", "modes"]
    assert {value for value, measure in found.plain if measure == "accuracy"} == {4}
    assert {place[0] for place, measure in found.gains if measure == "accuracy"} == {4}
    whole, lines = landscape(points(), KEYS), found.layout("map").lines
    assert found.gains[(4, 0, 0.2), "accuracy"] == whole.gains[(4, 0, 0.2), "accuracy"]
    assert [line[3] for line in lines[:5]] == ["–"] * 5 and "–" not in [x[3] for x in lines[5:]]
    svg, _ = landscape_picture(found)
    assert svg.count('id="axes_') == 4


def test_what_has_nothing_beside_it_is_named():
    guided = [p for p in points() if not p.plain or p.place[0] == 1]
    with pytest.raises(UserError, match=r"no unguided sets with sampler.cfg_scale=4 to compare"):
        landscape(guided, KEYS)
    with pytest.raises(UserError, match="no guided sets"):
        landscape([p for p in points() if p.plain], KEYS)


def test_sets_that_differ_in_more_than_the_keys_are_not_mixed():
    with pytest.raises(UserError, match=r"several sets of one seed at sampler.cfg_scale=1, guid"):
        landscape([*points(), next(p for p in points() if not p.plain)], KEYS)
    twice = [*points(), *(p for p in points() if p.plain)]  # method=unguided, and lambda 0
    assert landscape(twice, KEYS).plain == landscape(points(), KEYS).plain

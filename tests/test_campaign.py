"""A few kills, a race and two signals of the campaign; `python -m campaign` does hundreds."""

import pytest
from campaign import kills, races, signals

PARTS = {"kills": kills, "races": races, "signals": signals}


@pytest.mark.parametrize("name", PARTS)
def test_nothing_is_lost(tmp_path, name):
    found = list(PARTS[name].outcomes(tmp_path, quick=True, workers=2))
    assert found
    assert [f"{outcome.name}: {outcome.said}" for outcome in found if not outcome.good] == []

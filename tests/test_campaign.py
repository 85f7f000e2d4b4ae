"""A few kills, a race, two signals and bad inputs; `make campaign` does hundreds of each."""

import pytest
from campaign import inputs, kills, races, signals

PARTS = {"kills": kills, "races": races, "signals": signals, "inputs": inputs}


@pytest.mark.parametrize("name", PARTS)
def test_nothing_is_lost(tmp_path, name):
    found = list(PARTS[name].outcomes(tmp_path, quick=True, workers=2))
    assert found
    assert [f"{outcome.name}: {outcome.said}" for outcome in found if not outcome.good] == []

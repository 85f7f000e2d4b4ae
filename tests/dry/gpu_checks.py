"""Two subjects on a real GPU and on the CPU; test_dry.py runs this where a GPU may be seen."""

import pytest

from dry.generating import sampling, weights
from dry.learning import student
from mgd3.runtime.compute import pick_device

MAKES = {
    "sampling": sampling("dit_digits", "ddpm", "mode"),
    "hard_label": student("convnet3_w8", "hard_label"),
}


@pytest.mark.parametrize("name", MAKES)
def test_values_agree_up_to_rounding(name, tmp_path):
    weights(tmp_path)
    found = []
    for number, device in enumerate(("cpu", str(pick_device("auto")))):
        folder = tmp_path / str(number)
        folder.mkdir()
        values = MAKES[name](device, 3, folder)()
        found.append({key: value.cpu().double() for key, value in values.items()})
    for key, expected in found[0].items():
        if key != "top-1":  # one of eight images may be on the border
            assert (found[1][key] - expected).abs().mean() <= 1e-2 * max(1, expected.abs().max())

"""What an object was made with, as plain data; and what a folder of weights holds."""

import json
import logging
import shutil
from dataclasses import dataclass
from enum import Enum
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mgd3.data.claims import claim
from mgd3.distillers.settings import settings_of
from mgd3.modes.discovery import finder_digest
from mgd3.modes.oracle import TrueDigitModes
from mgd3.runtime.compute import Compute
from mgd3.runtime.errors import UserError
from mgd3.sampling.combination import Sum
from mgd3.sampling.guidance import ModeGuidance
from mgd3.sampling.guidances.deviation import DeviationGuidance
from mgd3.sampling.inversion import Inversion
from mgd3.storage.digests import content_digests


class Colour(Enum):
    RED = 1


@dataclass(frozen=True)
class Inner:
    low: int


def named():
    """A function that a module has."""


class Part:
    def __init__(self, **values):
        vars(self).update(values)

    @cached_property
    def found(self):
        return object()


def test_everything_a_part_was_made_with_counts_however_deep():
    part = Part(
        scale=0.1, inner=Inner(3), several=[Inner(1), None], by_name={"a": Inner(2)},
        colour=Colour.RED, folder=Path("x"), rule=named, bound=partial(named, 1, by=2),
        _own=object(), place="here",
    )  # fmt: skip
    _ = part.found
    settings = settings_of(part, {"place"})
    assert json.loads(json.dumps(settings)) == settings == {
        "class": f"{__name__}.Part", "scale": 0.1, "colour": "RED",
        "inner": {"class": f"{__name__}.Inner", "low": 3},
        "several": [{"class": f"{__name__}.Inner", "low": 1}, None], "folder": "x",
        "by_name": {"a": {"class": f"{__name__}.Inner", "low": 2}}, "rule": f"{__name__}.named",
        "bound": [f"{__name__}.named", [1], {"by": 2}],
    }  # fmt: skip


def test_tensors_and_networks_count_by_what_they_hold():
    one, two = Part(x=torch.zeros(2)), Part(x=torch.ones(2))
    assert settings_of(one) == settings_of(Part(x=torch.zeros(2))) != settings_of(two)
    assert settings_of(one) == settings_of(Part(x=np.zeros(2, np.float32)))
    assert settings_of(Part(n=np.int64(3), names={"b", "a"}))["names"] == ['"a"', '"b"']
    assert settings_of(Part(x=torch.zeros(2, dtype=torch.bfloat16))) != settings_of(one)
    assert settings_of(Part(x=torch.nn.Parameter(torch.zeros(2)))) == settings_of(one)
    assert settings_of(Part(x=np.zeros(4, np.float32)[::-2])) == settings_of(one)
    assert settings_of(Part(x=float("nan"))) == settings_of(Part(x=float("nan")))
    net = torch.nn.Linear(2, 2)
    before = settings_of(Part(net=net))
    with torch.no_grad():
        net.weight.add_(1)
    assert settings_of(Part(net=net)) != before


@pytest.mark.parametrize(
    "value",
    [lambda: 0, partial(lambda: 0), object(), np.array(["text"]), logging.getLogger("x")],
    ids=["lambda", "partial", "object", "array of text", "what leads back to itself"],
)
def test_what_cannot_be_told_apart_is_refused_by_name(value):
    with pytest.raises(UserError, match=r"(?s)Part\.rule.* is .* cannot be told from another"):
        settings_of(Part(rule=value))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (DeviationGuidance(120, 30, 45, 64), DeviationGuidance(120, 0, 10, 64)),
        (Sum(a=ModeGuidance(0.1, 25)), Sum(a=ModeGuidance(5.0, 0))),
        (Part(inversion=Inversion(steps=50, level=30, cfg_scale=4, cfg_channels=3)),
         Part(inversion=Inversion(steps=50, level=10, cfg_scale=4, cfg_channels=3))),
    ],
)  # fmt: skip
def test_parts_within_parts_make_other_settings(one, two):
    assert settings_of(one) != settings_of(two)


def test_functions_are_told_apart_and_where_one_computes_does_not_count():
    assert settings_of(named) != settings_of(test_a_finder_is_the_same_one_after_it_has_found)
    assert settings_of(partial(named, 1)) != settings_of(partial(named, 2))
    with pytest.raises(UserError, match="cannot be told"):
        settings_of(lambda: 0)
    one, two = (Part(compute=Compute(device="cpu", precision=p)) for p in ("float32", "bfloat16"))
    assert settings_of(one) == settings_of(two)
    assert settings_of(Part(place="left")) != settings_of(Part(place="right"))


def test_finders_are_told_apart_by_what_their_arrays_hold_and_bound_functions_not_at_all():
    long = torch.zeros(5000)
    other = long.clone()
    other[2500] = 1
    found = []
    for values in (long, other):
        finder = TrueDigitModes()
        finder.values = values
        found.append(finder_digest(finder))
    assert found[0] != found[1]
    assert finder_digest(partial(named, 1)) is None


def test_a_finder_is_the_same_one_after_it_has_found():
    finder = TrueDigitModes()
    before = finder_digest(finder)
    assert finder._known
    assert finder_digest(finder) == before != finder_digest(TrueDigitModes(1))


def test_a_folder_of_weights_counts_by_what_it_holds(tmp_path):
    folder = tmp_path / "pipeline"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/model.safetensors").write_bytes(b"one")
    (folder / ".cache").mkdir()

    def held(path):
        return content_digests({"backbone.weights": path}, tmp_path)["backbone.weights"]

    before = held(folder)
    (folder / ".cache/download").write_bytes(b"its own business")
    (folder / "unet/gone").symlink_to("nowhere")
    assert held(folder) == before == held(shutil.copytree(folder, tmp_path / "copy", symlinks=True))
    (folder / "unet/model.safetensors").write_bytes(b"two")  # as many bytes
    assert held(folder) != before
    (folder / "unet/model.safetensors").write_bytes(b"one")
    assert held(folder) == before
    (folder / "unet").rename(tmp_path / "elsewhere")  # the same by a link
    (folder / "unet").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert held(folder) == before
    (tmp_path / "elsewhere/model.safetensors").write_bytes(b"two")
    assert held(folder) != before
    (tmp_path / "elsewhere/back").symlink_to(folder, target_is_directory=True)
    held(folder)  # ends


def test_a_folder_claimed_before_folders_were_noted_stays_and_one_noted_is_compared(tmp_path):
    def call(**files):
        made = {"weights": "w/, 3 bytes"}
        claim(tmp_path / "identity.json", made, {}, tmp_path, "take another folder", files=files)

    one, two = "1" * 64, "2" * 64
    call(teacher=one)
    call(teacher=one, weights=two)
    with pytest.raises(UserError, match=rf"files\.teacher={two} \(there: {one}\)"):
        call(teacher=two, weights=two)

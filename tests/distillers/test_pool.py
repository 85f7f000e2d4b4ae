"""Candidate pools: choices by hand and by brute force; runs with a pool."""

from itertools import product

import numpy as np
import pytest
import torch
from conftest import run
from support import composed

from mgd3.config.schema import validate
from mgd3.distillers.pool import Diverse, FirstCandidates, Moments, TeacherCorrect, checked
from mgd3.runtime.errors import UserError
from mgd3.storage.files import read_json

SHORT = (
    "tracker=none", "report=false", "features=student", "features.epochs=1",
    "features.student=convnet2_w8",
    "students=[convnet2_w8]", "protocol.epochs_by_ipc=[[null,2]]", "compute.device=cpu", "ipc=2",
    "sampler.steps=4", "guidance.stop_t=2",
)  # fmt: skip


TANGENT = ("guidance=mode_tangent", "guidance.tangent_dim=3")


class Real:
    """A extract that knows one class's real features."""

    def __init__(self, features):
        self.features = features

    def fit(self, dataset, inventory):
        return self

    def real(self, label):
        return self.features


def test_the_teacher_keeps_the_first_that_it_recognises_or_the_likeliest():
    right, wrong, less_wrong = [0.0, 2.0], [2.0, 0.0], [1.0, 0.5]
    logits = torch.tensor([wrong, right, wrong, right, right, less_wrong])  # modes 0 1 2 0 1 2
    chosen = TeacherCorrect(Real(None)).choose(torch.zeros(6, 1), logits, label=1, ipc=3)
    assert chosen == [3, 1, 5]


def test_diverse_candidates_keep_away_from_each_other():
    points = torch.tensor([[0.0], [0.1], [5.0], [9.0], [3.0], [0.2]])  # modes 0 1 2 0 1 2
    assert Diverse(Real(None)).choose(points, torch.zeros(6, 2), label=0, ipc=3) == [0, 4, 2]


def test_moments_are_met_as_well_as_exchanges_of_one_can():
    draw = torch.Generator().manual_seed(0)
    real = 2 + 3 * torch.randn(200, 2, generator=draw, dtype=torch.float64)
    points = 4 * torch.randn(12, 2, generator=draw, dtype=torch.float64)
    finder = Moments(Real(real))
    finder.fit(None, None)
    chosen = finder.choose(points, torch.zeros(12, 2), label=0, ipc=3)

    def misfit(rows):
        mine = points[list(rows)]
        means = (mine.mean(0) - real.mean(0)).square().sum()
        stds = (mine.std(0, correction=0) - real.std(0, correction=0)).square().sum()
        return (means + stds).item()

    assert [row % 3 for row in chosen] == [0, 1, 2]
    slots = [range(k, 12, 3) for k in range(3)]
    for k, row in product(range(3), range(4)):
        assert misfit(chosen) <= misfit([*chosen[:k], slots[k][row], *chosen[k + 1 :]]) + 1e-12
    assert misfit(chosen) < misfit([0, 1, 2])


def images_of(folder):
    (manifest,) = folder.rglob("manifest.json")
    files = {str(p.relative_to(manifest.parent)): p.read_bytes()
             for p in manifest.parent.glob("images/*/*.png")}  # fmt: skip
    return files, read_json(manifest)


def test_a_pool_extends_a_run_without_one_and_the_manifest_says_what_was_kept(tmp_path):
    plain, first, diverse = (tmp_path / name for name in ("plain", "first", "diverse"))
    for out, options in [
        (plain, [*TANGENT]),
        (first, [*TANGENT, "pool=3"]),
        (diverse, [*TANGENT, "pool=3", "select=diverse"]),
    ]:
        out.mkdir()
        done = run(out, *SHORT, *options)
        assert done.returncode == 0, done.stderr[-1500:]
    files, _ = images_of(plain)
    assert images_of(first)[0] == files
    kept, manifest = images_of(diverse)
    assert kept != files
    pool = next(diverse.rglob(".pool"))
    for entry in manifest["images"]:
        _, wnid, stream = entry["noise_stream"].split("/")
        assert int(stream) % 2 == entry["index"]
        candidate = pool / "images" / wnid / f"{int(stream):05d}.png"
        assert candidate.read_bytes() == kept[entry["file"]]
    assert len(list(pool.glob("images/*/*.png"))) == 10 * 3 * 2


def test_without_a_choice_the_first_ones_stay():
    assert FirstCandidates()([None] * 6, label=0, ipc=2) == [0, 1]


@pytest.mark.parametrize("chosen", [None, [0], [0, 0], [0, 4], [-2, 1], [0.0, 1.0], "01"])
def test_what_is_not_so_many_different_candidates_is_refused(chosen):
    with pytest.raises(UserError, match="must return 2 different numbers from 0 to 3"):
        checked(chosen, candidates=4, ipc=2, selection=FirstCandidates())


def test_a_choice_may_take_several_of_one_mode_in_any_order():
    assert checked([3, 1], candidates=4, ipc=2, selection=FirstCandidates()) == [3, 1]


def test_numpys_numbers_are_numbers():
    chosen = checked(np.array([2, 1]), candidates=4, ipc=2, selection=FirstCandidates())
    assert chosen == [2, 1] and {type(c) for c in chosen} == {int}


def test_a_pool_of_none_is_refused():
    with pytest.raises(UserError, match=r"pool=0 is out of range; allowed: >= 1"):
        validate(composed("pool=0"))

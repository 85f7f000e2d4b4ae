"""Guidance terms against small hand-made cases."""

import pytest
import torch

from mgd3.modes.finders import Modes
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import (
    ModeGuidance,
    ModeTerm,
    NoGuidance,
    TangentModeGuidance,
    tangent_basis,
)
from mgd3.sampling.terms import DenoiseState, SamplingBatch, Target

SHAPE = (1, 2, 2)


def modes_of(centers):
    """Modes whose centers are constant latents."""
    count = len(centers)
    return Modes(
        centers=torch.stack([torch.full(SHAPE, float(c)) for c in centers]),
        counts=torch.ones(count, dtype=torch.long),
        assignment=torch.arange(count),
        nearest=torch.arange(count),
    )


def state(x0_hat, step=49, num_steps=50):
    x = torch.tensor([float(v) for v in x0_hat]).view(-1, 1, 1, 1).expand(-1, *SHAPE)
    return DenoiseState(step=step, num_steps=num_steps, x_t=x, x0_hat=x)


def batch_of(rows, latents=lambda: torch.zeros(0, *SHAPE)):
    targets = [Target(modes=modes, index=k, latents=latents) for modes, k in rows]
    return SamplingBatch(
        class_ids=torch.zeros(len(rows), dtype=torch.long),
        modes=torch.stack([modes.centers[k] for modes, k in rows]),
        targets=targets,
    )


def term(guidance, rows, at):
    """g_t of each row, one number because all is constant."""
    return guidance.bind(batch_of(rows))(at).flatten(1).mean(dim=1).tolist()


def test_a_batch_is_guided_as_the_paper_says():
    rows = [(modes_of([4.0, 8.0]), 0), (modes_of([2.0]), 0)]
    assert term(ModeGuidance(0.1, 25), rows, state([1.0, 1.0])) == pytest.approx([0.3, 0.1])
    assert term(ModeGuidance(0.1, 25), rows, state([1.0, 1.0], step=25)) == [0, 0]
    assert term(NoGuidance(), rows, state([1.0, 1.0])) == [0, 0]


@pytest.mark.parametrize(("stop_t", "guided"), [(25, 24), (0, 49), (49, 0), (50, 0)])
def test_stop_is_strict(stop_t, guided):
    pull = ModeTerm(torch.ones(1, *SHAPE), scale=0.1, stop_t=stop_t)
    steps = [step for step in range(50) if pull(state([0.0], step=step)).any()]
    assert len(steps) == guided
    assert steps == list(range(stop_t + 1, 50))
    assert ModeGuidance(0.1, stop_t).guided_steps(50) == guided
    assert ModeGuidance(0, stop_t).guided_steps(50) == 0


def test_a_tangent_pull_stays_in_the_plane_of_the_real_latents():
    flat = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    flat[:, 2:] = 0  # the class lies in the plane of the first two coordinates
    latents = flat.view(-1, *SHAPE)
    x0_hat = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, *SHAPE)
    at = DenoiseState(step=49, num_steps=50, x_t=x0_hat, x0_hat=x0_hat)
    batch = batch_of([(modes_of([0.0]), 0)], lambda: latents)

    def pull(dim):
        return TangentModeGuidance(0.1, 25, tangent_dim=dim).bind(batch)(at).flatten()

    assert torch.allclose(pull(2), torch.tensor([-0.1, -0.2, 0, 0]), atol=1e-6)
    assert torch.allclose(pull(3), pull(2), atol=1e-6)  # the third direction does not exist
    assert pull(1)[2:].abs().max() < 1e-6 and 0 < pull(1).norm() <= pull(2).norm()


def test_tangents_are_those_of_the_nearest_points_and_identical_points_have_none():
    near = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    far = torch.tensor([[50.0, 0.0], [50.0, 9.0], [50.0, -9.0]])
    basis = tangent_basis(torch.cat([far, near]), torch.tensor([1.0, 0.0]), dim=1, neighbors=3)
    assert torch.allclose(basis.abs(), torch.tensor([[1.0, 0.0]]))
    assert not tangent_basis(torch.ones(5, 3), torch.ones(3), dim=2, neighbors=4).any()


def test_a_row_does_not_depend_on_its_batch():
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(40, *SHAPE, generator=draw)
    rows = [(modes_of([k, k + 3.0]), k % 2) for k in range(5)]
    x = torch.randn(5, *SHAPE, generator=draw)

    def pulls(rows, x):
        at = DenoiseState(step=49, num_steps=50, x_t=x, x0_hat=x)
        return TangentModeGuidance(0.1, 25, tangent_dim=2).bind(batch_of(rows, lambda: latents))(at)

    together = pulls(rows, x)
    alone = torch.cat([pulls([row], x[k : k + 1]) for k, row in enumerate(rows)])
    assert torch.allclose(together, alone, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop_t": "never"}, r"guidance\.stop_t='never' is not an integer"),
        ({"tangent_dim": 0}, r"guidance\.tangent_dim=0"),
        (
            {"tangent_dim": 3, "tangent_neighbors": 3},
            r"guidance\.tangent_neighbors=3 is out of range; allowed: >= 4",
        ),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        TangentModeGuidance(**{"scale": 0.1, "stop_t": 25, "tangent_dim": 2} | options)

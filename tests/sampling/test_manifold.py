"""ManifoldGD: its cloud, the length of its push, and what that push is worth beside a seed."""

from itertools import pairwise

import pytest
import torch

from mgd3.backbones.toy import Toy
from mgd3.modes.alternatives import BisectingModes
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream
from mgd3.sampling.guidance import ModeGuidance, NoGuidance, TangentModeGuidance
from mgd3.sampling.guidances.manifold import Cloud, ManifoldGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDIM, DDPM
from mgd3.sampling.terms import DenoiseState, SamplingBatch, Target

SHAPE = (1, 8, 8)
CLOUD = {"points": 300, "radius": 0.05, "line_from": 0.1, "widest": 2.0, "warm": 5}


def batch(rows=(0, 1, 2), seed=0):
    modes = torch.stack(
        [torch.randn(SHAPE, generator=torch.Generator().manual_seed(k)) for k in rows]
    )
    return SamplingBatch(
        class_ids=torch.tensor([k % 2 for k in rows]),
        modes=modes,
        images=[(str(k % 2), k) for k in rows],
        seed=seed,
    )


def sample(guidance, rows=(0, 1, 2), seed=0, kind=DDPM, **options):
    fixed = {"variance": "fixed"} if kind is DDPM else {}
    walk = kind(steps=20, cfg_scale=2.0, cfg_channels=3, **fixed)
    noise = ImageNoise(seed, batch(rows).images, SHAPE)
    return walk(Toy(8, 0.0, 0.2, 0.3), batch(rows, seed), guidance, noise, **options)


def test_the_radius_shrinks_as_released():
    radii = [round(Cloud(**CLOUD).radius_at(k), 4) for k in range(7)]
    assert radii == [0.1, 0.0857, 0.0739, 0.0643, 0.0564, 0.05, 0.05]


def test_half_of_the_cloud_lies_on_a_line_of_radii_around_the_mode():
    mode = torch.randn(64, generator=torch.Generator().manual_seed(0))
    radii = (Cloud(**CLOUD).around(mode, 0, stream("here")) - mode).norm(dim=1)
    assert radii.shape == (300,) and (radii[:150] - 0.1).abs().max() < 1e-5
    assert radii[150:].max() <= 0.1 and 0.03 < radii[150:].mean() < 0.07


@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_the_push_moves_the_next_step_by_its_own_length(kind):
    """A tenth at every guided step, away from the tangents, towards the cloud, nothing later."""
    guidance, seen = ManifoldGuidance(0.1, 10), []
    sample(guidance, kind=kind, on_step=seen.append)
    term, pull = guidance.bind(batch()), ModeGuidance(0.1, 10).bind(batch())
    for state in seen:
        shift = state.gain * (term(state) - pull(state))
        lengths = shift.flatten(1).norm(dim=1)
        expected = 0.1 if state.step > 10 else 0.0
        assert (lengths - expected).abs().max() < 1e-5
        middle = state.abar**0.5 * batch().modes
        if state.step > 10:
            assert ((middle - state.x_t) * shift).flatten(1).sum(dim=1).min() > 0


def test_rows_do_not_see_each_other_and_no_push_is_mode_guidance():
    together, apart = sample(ManifoldGuidance(0.1, 10)), sample(ManifoldGuidance(0.1, 10), (2,))
    assert torch.allclose(together[2:], apart, atol=1e-5)
    assert torch.equal(sample(ManifoldGuidance(0.1, 10, push=0.0)), sample(ModeGuidance(0.1, 10)))
    assert torch.equal(sample(ManifoldGuidance(0.0, 10, push=0.0)), sample(NoGuidance()))
    assert ManifoldGuidance(0.0, 10).guided_steps(20) == 9
    assert ManifoldGuidance(0.0, 10, push=0.0).guided_steps(20) == 0


def test_turning_the_push_off_moves_less_than_another_seed():
    rows = tuple(range(8))
    with_it, without = (sample(ManifoldGuidance(0.1, 10, push=p), rows) for p in (0.1, 0.0))
    other = sample(ManifoldGuidance(0.1, 10), rows, seed=1)
    moved = (with_it - without).flatten(1).norm(dim=1)
    assert moved.min() > 0 and moved.mean() < (with_it - other).flatten(1).norm(dim=1).mean() / 10


def test_projecting_twice_changes_nothing_and_never_lengthens():
    """What the text describes: `guidance=mode_tangent`."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(40, *SHAPE, generator=draw)
    modes = BisectingModes(0)(latents, 2)
    target = Target(modes=modes, index=0, latents=lambda: latents)
    one = SamplingBatch(
        class_ids=torch.zeros(1, dtype=torch.long), modes=modes.centers[:1], targets=[target]
    )
    x0_hat = torch.randn(1, *SHAPE, generator=draw)

    def term(x0_hat, kind, **options):
        at = DenoiseState(step=49, num_steps=50, x_t=x0_hat, x0_hat=x0_hat)
        return kind(1.0, 25, **options).bind(one)(at)

    once = term(x0_hat, TangentModeGuidance, tangent_dim=3)
    twice = term(one.modes - once, TangentModeGuidance, tangent_dim=3)  # whose pull is `once`
    assert torch.allclose(once, twice, atol=1e-5)
    assert 0 < once.norm() < term(x0_hat, ModeGuidance).norm()


@pytest.mark.parametrize("n_init", [1, 10])
def test_leaves_hold_everything_and_halving_never_raises_the_error(n_init):
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(60, *SHAPE, generator=draw)
    errors = []
    for count in range(1, 13):
        modes = BisectingModes(0, n_init)(latents, count)
        assert modes.counts.sum() == 60 and modes.counts.min() >= 1
        errors.append((latents - modes.centers[modes.assignment]).square().sum().item())
    assert all(later <= before + 1e-3 for before, later in pairwise(errors))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"points": 301}, "guidance.points=301 is odd"),
        ({"points": 8}, r"guidance\.points=8 is out of range; allowed: >= 12"),
        ({"neighbors": 3}, r"guidance\.neighbors=3 is out of range; allowed: >= 4"),
        ({"bandwidth": 0}, r"guidance\.bandwidth=0"),
        ({"widest": 0.5}, r"guidance\.widest=0\.5"),
        ({"push": -1}, r"guidance\.push=-1"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(UserError, match=said):
        ManifoldGuidance(0.1, 25, **options)

"""DAP: features of a block, distances in them, and what a step towards real images does."""

from dataclasses import replace

import pytest
import torch

from mgd3.backbones.dit import DiT
from mgd3.backbones.toy import Toy
from mgd3.data.digits import Digits
from mgd3.data.inventory import take_inventory
from mgd3.runtime.compute import Compute, Work
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import NoGuidance
from mgd3.sampling.guidances import real_features
from mgd3.sampling.guidances.prior import PriorGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDIM, DDPM
from mgd3.sampling.terms import SamplingBatch

WEIGHTS = "mgd3/backbones/weights/dit_digits.safetensors"
ROWS = (("3", 0), ("5", 0), ("3", 1))


@pytest.fixture(scope="module")
def backbone():
    return DiT(WEIGHTS, None, 8, num_heads=4, compute=Compute(device="cpu"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return Work(cache=cache, batch_size=8, workers=1, flip="none")


def fitted(backbone, work, ask="fit", **options):
    guidance = PriorGuidance(**{"scale": 0.03, "block": 2, "real_images": 8} | options)
    dataset = Digits(8)
    inventory = take_inventory(dataset, "train", 1, work.cache, work.workers)
    getattr(guidance, ask)(dataset, inventory, backbone, work)
    return guidance


def batch(rows=ROWS):
    return SamplingBatch(
        class_ids=torch.tensor([int(wnid) for wnid, _ in rows]),
        modes=torch.zeros(len(rows), 1, 8, 8),
        images=list(rows),
    )


def sample(backbone, guidance, rows=ROWS, kind=DDIM, **options):
    one = batch(rows)
    noise = ImageNoise(0, one.images, (1, 8, 8))
    return kind(steps=5, cfg_scale=2.0, cfg_channels=3)(backbone, one, guidance, noise, **options)


def energy(guidance, backbone, state, rows=ROWS):
    """Each row's mean distance to its class's real images, (B,)."""
    one, real = batch(rows), guidance._real
    ids = one.class_ids
    with torch.no_grad():
        seen = guidance._look(backbone, state.x_t, state.t, one.class_ids)
        return torch.stack(
            [
                guidance.distance(row, real.at(wnid, int(ids[k]), ids[k], state)).mean()
                for k, (row, (wnid, _)) in enumerate(zip(seen, rows, strict=True))
            ]
        )


def states_of(backbone, rows=ROWS):
    seen = []
    sample(backbone, NoGuidance(), rows, on_step=seen.append)
    return seen


def test_the_linear_kernel_is_the_euclidean_distance_and_has_a_slope_everywhere():
    draw = torch.Generator().manual_seed(0)
    real, seen = (torch.randn(n, 50, generator=draw) for n in (7, 1))
    linear, rbf = (PriorGuidance(1.0, 1, kernel=k, bandwidth=8.0) for k in ("linear", "rbf"))
    assert (linear.distance(seen[0], real) - torch.cdist(seen, real)[0]).abs().max() < 1e-5
    k = torch.exp(-torch.cdist(seen, real)[0].square() / 128)
    assert (rbf.distance(seen[0], real) - (2 - 2 * k).sqrt()).abs().max() < 1e-5
    for guidance in (linear, rbf):
        assert guidance.distance(real[0], real[:1]).item() == pytest.approx(0, abs=2e-6)
        assert guidance._slope(real[0].clone(), real[:1]).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": "rbf", "noise": "step"},
        {"pooling": "mean", "feature_norm": "unit"},
        {"condition": "no_class", "real_images": None},
    ],
    ids=["plain", "rbf", "pooled", "no class"],
)
def test_a_small_step_along_the_term_lowers_the_distance(backbone, work, options):
    guidance = fitted(backbone, work, scale=0.02, **options)
    term = guidance.bind(batch())
    for state in states_of(backbone)[1:4]:
        shift = term(state) * state.gain
        assert (shift.square().mean(dim=(1, 2, 3)).sqrt() - 0.02).abs().max() < 1e-6
        before = energy(guidance, backbone, state)
        state.x_t.add_(shift)
        assert (energy(guidance, backbone, state) < before).all()


def test_images_of_one_class_may_be_told_different_things(backbone, work):
    """As with a prompt for each image: real features are those under the image's own."""
    keys = [("3", 0), ("3", 1)]
    states = states_of(backbone, keys)

    def shift(rows):
        told = SamplingBatch(
            class_ids=torch.tensor([(3, 5)[k] for k in rows]),
            modes=torch.zeros(len(rows), 1, 8, 8),
            images=[keys[k] for k in rows],
        )
        state = replace(states[1], x_t=states[1].x_t[rows], x0_hat=states[1].x0_hat[rows])
        return fitted(backbone, work).bind(told)(state)

    together = shift([0, 1])
    assert torch.allclose(together, torch.cat([shift([0]), shift([1])]), atol=1e-5)


def test_the_term_is_the_gradient_of_the_distance(backbone, work):
    guidance, state = fitted(backbone, work, scale=1.0, gradient="raw"), states_of(backbone)[2]
    shift = guidance.bind(batch())(state) * state.gain
    way = torch.randn(shift.shape, generator=torch.Generator().manual_seed(0))
    at = state.x_t.clone()
    ends = []
    for sign in (1, -1):
        state.x_t.copy_(at + sign * 1e-2 * way)
        ends.append(energy(guidance, backbone, state))
    slope = (ends[0] - ends[1]) / 2e-2
    assert torch.allclose((shift * way).sum(dim=(1, 2, 3)), -slope, rtol=0.02, atol=1e-2)


@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_rows_do_not_see_each_other_and_no_scale_gives_plain_samples(backbone, work, kind):
    guidance = fitted(backbone, work)
    together = sample(backbone, guidance, kind=kind)
    apart = torch.cat([sample(backbone, guidance, (row,), kind) for row in ROWS])
    plain = sample(backbone, NoGuidance(), kind=kind)
    assert torch.allclose(together, apart, atol=1e-3)
    assert (together - plain).abs().max() > 0.05
    assert torch.equal(sample(backbone, fitted(backbone, work, scale=0.0), kind=kind), plain)
    assert all(p.grad is None for p in backbone.bare.network.parameters())


def test_steps_outside_the_window_are_plain(backbone, work):
    guidance = fitted(backbone, work, low=1, high=3)
    term = guidance.bind(batch())
    moved = [bool(term(state).any()) for state in states_of(backbone)]
    assert moved == [False, True, True, True, False]


@pytest.mark.parametrize("room", [0, 20_000, 2**30])
def test_what_memory_keeps_changes_no_sample(backbone, work, monkeypatch, room):
    calls = []
    guidance = fitted(backbone, work, pooling="mean")
    expected = sample(backbone, guidance)
    monkeypatch.setattr(real_features, "_ROOM", room)
    guidance = fitted(backbone, work, pooling="mean")
    look = guidance._real._look
    guidance._real._look = lambda *given: calls.append(given) or look(*given)
    for _ in range(2):
        assert torch.equal(sample(backbone, guidance), expected)
    each = 2 * 5  # classes, steps
    # what is not kept is made once a step, for all rows of its class
    assert len(calls) == each if room == 2**30 else each < len(calls) <= 2 * each
    assert room or len(calls) == 2 * each
    held = sum(kept.numel() * 4 for kept in guidance._real._kept.values())
    assert held <= room


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block": 7}, r"guidance\.block=7 is out of range; allowed: 1\.\.6"),
        ({"kernel": "cubic"}, r"guidance\.kernel='cubic' is unknown.*linear, rbf"),
        ({"low": 4, "high": 3}, r"guidance\.high=3"),
        ({"scale": -1}, r"guidance\.scale=-1"),
    ],
)
def test_wrong_options_are_named(backbone, work, options, said):
    with pytest.raises(UserError, match=said):
        fitted(backbone, work, **options)


@pytest.mark.parametrize("ask", ["fit", "stages"])  # of a run, and of its plan
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"block": None}, r"guidance\.block is not set"),
        ({"kernel": "rbf", "real_images": 1}, r"guidance\.kernel=rbf .*set guidance\.bandwidth"),
    ],
)
def test_a_plan_refuses_too(backbone, work, options, said, ask):
    with pytest.raises(UserError, match=said):
        fitted(backbone, work, ask, **options)


def test_a_window_beyond_the_steps_is_named():
    with pytest.raises(UserError, match=r"guidance\.high=50 is out of range; allowed: <= 49"):
        PriorGuidance(1.0, 2, high=50).check(50)


@pytest.mark.parametrize("ask", ["fit", "stages"])
def test_backbones_that_cannot_are_refused(work, ask):
    with pytest.raises(UserError, match="which Toy does not show; use a DiT"):
        fitted(Toy(8, 0.0, 0.2, 0.3), work, ask)
    half = DiT(WEIGHTS, None, 8, 4, compute=Compute(device="cpu", precision="float16"))
    with pytest.raises(UserError, match=r"underflow in compute\.precision=float16"):
        fitted(half, work, ask)

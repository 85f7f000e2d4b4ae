"""Samplers and guidance against closed forms, on the toy backbone."""

import pytest
import torch

from mgd3.backbones.contract import Prediction
from mgd3.backbones.schedule import NoiseSchedule, linear_alphas_cumprod
from mgd3.backbones.toy import Toy
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import ModeGuidance, NoGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDIM, DDPM, ReleasedDDIM, ReverseStep, classifier_free
from mgd3.sampling.starts import PrototypeStart
from mgd3.sampling.terms import DenoiseState, SamplingBatch

SHAPE = (1, 4, 4)
KINDS = [DDPM, DDIM, ReleasedDDIM]


def toy(**options):
    return Toy(**{"image_size": 4, "mean": 0.5, "shift": 0.0, "std": 0.3} | options)


def sampler(kind, steps=50, cfg_scale=1.0):
    options = {"variance": "fixed"} if kind is DDPM else {}
    return kind(steps=steps, cfg_scale=cfg_scale, cfg_channels=3, **options)


def sample(kind, guidance, mode=0.0, count=64, seed=0, backbone=None, start=None, **options):
    keys = [(str(k % 2), k) for k in range(count)]
    return sampler(kind, **options)(
        backbone or toy(),
        SamplingBatch(
            class_ids=torch.tensor([k % 2 for k in range(count)]),
            modes=torch.full((count, *SHAPE), float(mode)),
        ),
        guidance,
        ImageNoise(seed, keys, SHAPE),
        start=start,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_unguided_samples_follow_the_data(kind):
    x = sample(kind, NoGuidance(), count=512, steps=200)
    assert x.mean() == pytest.approx(0.5, abs=0.05)
    assert x.std() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_moves_samples_toward_the_mode(kind):
    gaps = [
        (sample(kind, ModeGuidance(scale, stop_t=0), mode=4.0) - 4.0).mean().abs()
        for scale in (0.0, 0.02, 0.05, 0.1)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0] - 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_stopping_earlier_leaves_samples_closer_to_the_data(kind):
    gaps = [
        (sample(kind, ModeGuidance(0.1, stop_t=stop), mode=4.0) - 0.5).mean().abs()
        for stop in (0, 25, 50)
    ]
    assert gaps == sorted(gaps, reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weaker_start_stays_closer_to_its_prototype(kind):
    """Data are N(0.5, 0.3); the prototype lies at 4."""
    gaps = [
        (sample(kind, NoGuidance(), mode=4.0, start=PrototypeStart(strength)) - 4.0).mean().abs()
        for strength in (0.02, 0.2, 0.4, 1.0)
    ]
    assert gaps[:3] == sorted(gaps[:3])
    assert gaps[0] < 0.5 and gaps[3] == pytest.approx(3.5, abs=0.2)


def test_strength_counts_steps():
    steps = [PrototypeStart(strength).steps(50) for strength in (0.0, 0.5, 0.7, 1.0)]
    assert steps == [1, 25, 35, 50]
    schedule = NoiseSchedule(alphas_cumprod=linear_alphas_cumprod()).respaced(50)
    batch = SamplingBatch(class_ids=torch.tensor([0]), modes=torch.ones(SHAPE))
    x = PrototypeStart(0.7).initial(schedule, batch, torch.zeros(SHAPE))
    assert x.mean() == pytest.approx(schedule.abar[34].sqrt().item())
    with pytest.raises(UserError, match=r"start\.strength=1\.5"):
        PrototypeStart(1.5)


@pytest.mark.parametrize("kind", KINDS)
def test_scale_zero_is_no_guidance(kind):
    guided = sample(kind, ModeGuidance(0.0, stop_t=0), mode=4.0)
    assert torch.equal(guided, sample(kind, NoGuidance()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 7])
def test_rows_do_not_depend_on_their_batch(kind, batch):
    keys = [(str(k % 2), k) for k in range(14)]
    ids = torch.tensor([k % 2 for k in range(14)])
    modes = torch.arange(14.0).view(14, 1, 1, 1).expand(14, *SHAPE)

    def draw(rows):
        return sampler(kind, cfg_scale=4.0)(
            toy(shift=0.3),
            SamplingBatch(class_ids=ids[rows], modes=modes[rows]),
            ModeGuidance(0.1, 25),
            ImageNoise(3, [keys[r] for r in rows], SHAPE),
        )

    order = torch.randperm(14, generator=torch.Generator().manual_seed(1)).tolist()
    parts = [order[i : i + batch] for i in range(0, 14, batch)]
    apart = torch.cat([draw(rows) for rows in parts])
    assert (apart - draw(list(range(14)))[order]).abs().max() < 1e-5


def test_each_image_has_a_stream_of_its_own():
    first, second = (ImageNoise(0, [("a", 1), ("b", k)], SHAPE) for k in (0, 1))
    assert torch.equal(first.initial()[0], second.initial()[0])
    a, b = first.step(), second.step()
    assert torch.equal(a[0], b[0])
    assert not torch.equal(a[1], b[1])
    assert not torch.equal(a[0], ImageNoise(1, [("a", 1)], SHAPE).initial()[0])


@pytest.mark.parametrize(("kind", "expected"), [(DDIM, 1.334141), (ReleasedDDIM, 1.300481)])
def test_the_two_ddim_rules_by_hand(kind, expected):
    """abar 0.25 to 0.64, x_t 1, eps 0.5, so x0_hat 2 - sqrt(3)/2; m 3, lambda 0.1: g_t 0.186603.

    Algorithm 1: eps_hat 0.338397, 0.8 (2 - sqrt(3) eps_hat) + 0.6 eps_hat.
    Released: 0.8 x0_hat + 0.6 eps + 0.5 g_t = 0.907180 + 0.3 + 0.093301.
    """
    schedule = NoiseSchedule(alphas_cumprod=torch.tensor([0.64, 0.25])).respaced(2)
    x_t, eps = torch.ones(1, *SHAPE), torch.full((1, *SHAPE), 0.5)
    x0_hat = schedule.predict_x0(x_t, eps, 1)
    assert x0_hat.mean() == pytest.approx(2 - 3**0.5 / 2)
    g_t = 0.1 * (3 - x0_hat)
    prediction, walk = Prediction(eps=eps, variance=None), sampler(kind, steps=2)
    gain = walk.gain(schedule, prediction, 1)
    state = DenoiseState(step=1, num_steps=2, x_t=x_t, x0_hat=x0_hat, gain=gain)
    step = ReverseStep(schedule=schedule, state=state, prediction=prediction, g_t=g_t)
    made = walk.previous(step, ImageNoise(0, [("0", 0)], SHAPE))
    assert made.mean() == pytest.approx(expected, abs=1e-6)
    assert made.max() - made.min() < 1e-6


def test_the_two_ddim_rules_agree_without_guidance():
    assert torch.allclose(sample(DDIM, NoGuidance()), sample(ReleasedDDIM, NoGuidance()), atol=1e-5)


class Recorder:
    """Says what it is asked, and answers with the label in every channel."""

    null_class = 9

    def predict(self, x_t, t, class_ids):
        eps = class_ids.float().view(-1, 1, 1, 1).expand(x_t.shape[0], 4, 1, 1)
        return Prediction(eps=eps, variance=eps)


def test_guidance_free_channels_stay_conditional():
    out = classifier_free(
        Recorder(), torch.zeros(1, 4, 1, 1), torch.zeros(1), torch.tensor([2]), 4.0, 3
    )
    guided = 9 + 4 * (2 - 9)
    assert out.eps.flatten().tolist() == [guided, guided, guided, 2]
    assert out.variance.flatten().tolist() == [2, 2, 2, 2]


def test_learned_variance_needs_a_backbone_that_learned_it():
    with pytest.raises(UserError, match=r"sampler\.variance=fixed"):
        DDPM(steps=5, cfg_scale=1.0, cfg_channels=3)(
            toy(),
            SamplingBatch(class_ids=torch.tensor([0]), modes=torch.zeros(1, *SHAPE)),
            NoGuidance(),
            ImageNoise(0, [("0", 0)], SHAPE),
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModeGuidance(-0.1, 25), r"guidance\.scale=-0\.1 .*>= 0"),
        (lambda: ModeGuidance("x", 25), r"guidance\.scale='x' is not a number"),
        (lambda: ModeGuidance(0.1, 60).check(50), r"guidance\.stop_t=60 .*0\.\.50"),
        (lambda: ModeGuidance(0.1, -1), r"guidance\.stop_t=-1"),
        (lambda: DDIM(steps=0, cfg_scale=4.0, cfg_channels=3), r"sampler\.steps=0"),
        (lambda: DDPM(50, 4.0, 3, variance="big"), r"sampler\.variance='big' .*learned, fixed"),
    ],
)
def test_wrong_values_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()

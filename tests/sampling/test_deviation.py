"""IGD's deviation: a closed form on the class's finished latents."""

import pytest
import torch
from test_gradients import PROVENANCE, distiller, images, toy, walk

from mgd3.data.digits import Digits
from mgd3.distillers.finished import FinishedLatents
from mgd3.distillers.image_maker import ImageMaker, Making
from mgd3.distillers.refining import NoRefinement
from mgd3.runtime.errors import UserError
from mgd3.sampling.combination import Sum
from mgd3.sampling.guidance import ModeGuidance, NoGuidance
from mgd3.sampling.guidances.deviation import DeviationGuidance, cosine_gradient
from mgd3.sampling.samplers import DDIM, DDPM
from mgd3.sampling.starts import NoiseStart
from mgd3.sampling.terms import DenoiseState, SamplingBatch, advice_of


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosines(x, memory):
    return torch.cosine_similarity(x.flatten()[None], memory.flatten(1))


def test_it_is_the_gradient_of_the_largest_cosine():
    x, memories = draw(3, 2, 4, 4), [draw(5, 2, 4, 4, seed=1), draw(1, 2, 4, 4, seed=2)]
    leaf = x.clone().requires_grad_()
    nearest = sum(cosines(row, memory).max() for row, memory in zip(leaf, memories, strict=False))
    expected = torch.autograd.grad(nearest, leaf)[0]
    found = cosine_gradient(x, [*memories, memories[0][:0]])
    assert torch.allclose(found, expected, atol=1e-14) and expected[:2].abs().min() > 0
    assert not found[2].any()  # its memory is empty


def test_the_shift_is_orthogonal_bounded_and_lowers_the_cosine():
    gamma, x, memory = 120.0, draw(1, 4, 8, 8), draw(9, 4, 8, 8, seed=1)
    memory[3] += 3 * x[0]
    shift = -gamma * cosine_gradient(x, [memory])
    assert abs((shift * x).sum()) < 1e-10
    assert 0 < shift.norm() <= gamma / x.norm()
    before, after = cosines(x, memory)[3], cosines(x + shift, memory)[3]
    assert before == cosines(x, memory).max() and after < before - 0.01


def test_a_push_far_stronger_than_published_is_said_with_the_published_one():
    released = DeviationGuidance(120.0, low=0, high=3, memory=64)
    assert advice_of(released, 50, 4 * 32 * 32) == []
    (small,) = advice_of(Sum(mode=ModeGuidance(0.1, 2), deviation=released), 50, 4 * 8 * 8)
    assert "gamma=120 moves" in small and "0.47 a step, 16 times" in small
    assert "gamma=7.5 is the published push" in small
    assert advice_of(DeviationGuidance(7.5, low=0, high=3, memory=64), 50, 4 * 8 * 8) == []
    assert advice_of(NoGuidance(), 50, 64) == []


@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_it_moves_the_next_step_by_an_absolute_amount_inside_its_window_alone(kind):
    keys, seen = [("a", 0), ("a", 1)], {}
    for gamma in (0.0, 2.0):
        guidance = DeviationGuidance(gamma, low=5, high=6, memory=64)
        maker = ImageMaker(toy(), walk(kind), guidance, NoiseStart(), NoRefinement())
        finished = FinishedLatents(None, ipc=2)
        finished.add(keys[:1], draw(1, 1, 4, 4).float())
        making = Making(seed=0, rows={"a": 0}, labels={"a": 0}, found={}, finished=finished)
        states = []
        maker.sample(keys[1:], making, states.append)
        seen[gamma] = {state.step: state.x_t for state in states}
    assert torch.equal(seen[0.0][6], seen[2.0][6])
    x = seen[0.0][6]
    shift = -2.0 * cosine_gradient(x, [draw(1, 1, 4, 4).float()])
    assert torch.allclose(seen[2.0][5] - seen[0.0][5], shift, atol=1e-5)
    assert shift.abs().max() > 0.05


def test_only_the_last_images_are_remembered():
    latents = draw(70, 1, 2, 2)
    guidance = DeviationGuidance(1.0, low=0, high=0, memory=64)
    x = latents[:1]  # nearest to the image that is forgotten
    batch = SamplingBatch(
        class_ids=torch.zeros(1, dtype=torch.long), modes=x, images=[("a", 70)],
        finished=lambda row: latents,
    )  # fmt: skip

    found = guidance.bind(batch)(DenoiseState(step=0, num_steps=1, x_t=x, x0_hat=x))
    assert torch.equal(found, -cosine_gradient(x, [latents[6:]]))
    assert not torch.allclose(found, -cosine_gradient(x, [latents]))


def test_the_first_image_of_a_class_is_that_of_a_run_without_it(tmp_path):
    digits, made = Digits(8), {}
    for gamma in (0.0, 0.5):
        guidance = DeviationGuidance(gamma, low=1, high=2, memory=64)
        out = tmp_path / str(gamma)
        distiller(tmp_path, guidance).distill(digits, 2, 0, out, PROVENANCE)
        made[gamma] = images(out)
    same = {name for name, data in made[0.0].items() if data == made[0.5][name]}
    assert same == {name for name in made[0.0] if name.endswith("00000.png")} and len(same) == 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gamma": -1.0}, r"guidance \(deviation\): gamma=-1"),
        ({"low": 4, "high": 3}, r"guidance \(deviation\): high=3 .*>= 4"),
        ({"memory": 0}, r"guidance \(deviation\): memory=0"),
        ({"high": 50}, r"guidance \(deviation\): high=50 .*<= 49"),
    ],
)
def test_wrong_values_are_refused(options, said):
    given = {"gamma": 120.0, "low": 3, "high": 45, "memory": 64} | options
    with pytest.raises(UserError, match=said):
        DeviationGuidance(**given).check(50)

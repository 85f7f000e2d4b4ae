"""IGD's influence: a student's gradient on each image turns to that on its class's real images."""

from dataclasses import replace

import pytest
import torch
from test_gradients import KINDS, SHAPE, toy, walk

from eval.metrics.gradients import StudentSnapshot
from eval.students.registry import make_student
from mgd3.backbones.codecs import PixelCodec
from mgd3.backbones.contract import Prediction
from mgd3.backbones.toy import Toy
from mgd3.runtime.errors import UserError
from mgd3.sampling.combination import Sum
from mgd3.sampling.guidance import NoGuidance
from mgd3.sampling.guidances.influence import InfluenceGuidance, misalignment, normalised
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDIM, DDPM, ReleasedDDIM
from mgd3.sampling.terms import Reach, SamplingBatch

CLASSES = 3


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Students:
    """Two students with fresh weights on images of 4 px, and as real images any."""

    def __init__(self, student="convnet2_w4"):
        nets = [make_student(student, CLASSES, 4, seed).double().eval() for seed in (0, 1)]
        self.snapshots = [StudentSnapshot(n, n.state_dict(), 4, "imagenet") for n in nets]
        self.asked = []

    def fit(self, dataset, inventory):
        return self

    def real(self, label):
        self.asked.append(label)
        images = draw(5, 3, 4, 4, seed=label).clamp(-1, 1)
        return torch.stack([s.gradient(images, label) for s in self.snapshots])


def influence(k=20.0, student="convnet2_w4", low=2, high=6, twin=False):
    guidance = InfluenceGuidance(
        k, rho=0.0015, low=low, high=high, twin=twin, surrogate=Students(student)
    )
    guidance.fit(None, [], toy(), None)
    return guidance


def batch_of(rows):
    return SamplingBatch(
        class_ids=torch.tensor([k % CLASSES for k in rows]),
        modes=torch.zeros(len(rows), *SHAPE, dtype=torch.float64),
        images=[(str(k % CLASSES), k) for k in rows],
        labels=[k % CLASSES for k in rows],
    )


def sample(guidance, rows=(0, 1, 2), kind=DDPM, **options):
    batch = batch_of(list(rows))
    return walk(kind)(toy(), batch, guidance, ImageNoise(0, batch.images, SHAPE), **options)


def state_at(guidance, rows, step, kind=DDPM):
    states = {}
    sample(guidance, rows, kind, on_step=lambda state: states.update({state.step: state}))
    return states[step]


def rms(x):
    return x.square().mean(dim=(1, 2, 3)).sqrt()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(kind):
    together = sample(influence(), (4, 7, 5, 4), kind)
    apart = [sample(influence(), (k,), kind)[0] for k in (4, 7, 5)]
    assert torch.allclose(together, torch.stack([*apart, apart[0]]), atol=1e-9)
    plain = sample(NoGuidance(), (4, 7, 5, 4), kind)
    assert (together - plain).abs().amax(dim=(1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_of_zero_gives_plain_samples_byte_for_byte(kind):
    plain = sample(NoGuidance(), kind=kind)
    assert torch.equal(sample(influence(k=0.0), kind=kind), plain)
    assert torch.equal(sample(influence(k=0.0, twin=True), kind=kind), plain)
    assert torch.equal(sample(Sum(a=influence(k=0.0), b=NoGuidance()), kind=kind), plain)


def loss_of(guidance, state, row, label):
    """1 - cosine of one row as a function of its x_t, through denoiser, decoder and student."""
    backbone, students = toy(), guidance.surrogate
    schedule = backbone.schedule.respaced(8)
    t, ids = torch.tensor([state.t]), torch.tensor([row % CLASSES])
    real = students.real(label)

    def loss(x):
        cond, free = (
            backbone.predict(x, t, i).eps for i in (ids, torch.tensor([backbone.null_class]))
        )
        x0 = schedule.predict_x0(x, free + 2 * (cond - free), state.step)
        images = PixelCodec(4).decode(x0)
        found = [
            misalignment(s.gradient(images, label), r)
            for s, r in zip(students.snapshots, real, strict=True)
        ]
        return sum(found).item() / len(found)

    return loss


@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_the_shift_is_the_normalised_gradient_of_central_differences(kind):
    """In every direction, so in any; one row of two, whose classes differ."""
    guidance, rows = influence(), (4, 5)
    state = state_at(guidance, rows, 4, kind)
    loss, x = loss_of(guidance, state, 4, 1), state.x_t.detach()[:1]
    h, slopes = 1e-5, torch.zeros_like(x)
    for place in range(x.numel()):
        way = torch.zeros(x.numel(), dtype=torch.float64)
        way[place] = h
        slopes.view(-1)[place] = (loss(x + way.view_as(x)) - loss(x - way.view_as(x))) / (2 * h)
    size = 20.0 * 0.0015 * rms(state.eps[:1]) * (1 - state.abar) ** 0.5
    expected = -size * slopes / rms(slopes)
    with torch.no_grad():
        shift = guidance.bind(batch_of(rows))(state) * state.gain
    assert torch.allclose(shift[:1], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item())


class TwoChannels(Toy):
    """It predicts a variance, another one for «no class»; a channel of it may go unguided."""

    def __init__(self):
        super().__init__(image_size=4, mean=0.5, shift=0.2, std=0.3)
        self.latent_shape, self.codec = (2, 4, 4), MeanOfChannels(4)

    def predict(self, x_t, t, class_ids):
        variance = torch.where(class_ids == self.null_class, -0.6, 0.2 * class_ids)
        return Prediction(
            eps=super().predict(x_t, t, class_ids).eps,
            variance=variance.to(x_t).view(-1, 1, 1, 1).expand_as(x_t),
        )


class MeanOfChannels(PixelCodec):
    def decode(self, latents):
        return super().decode(latents.mean(dim=1, keepdim=True))


def released_pair(backbone, guidance, key, label, seed, channels):
    """One image as IGD's released code makes it: of a pair, both decoded, the first steered."""
    students, shape = guidance.surrogate, backbone.latent_shape
    schedule, real = backbone.schedule.respaced(8), students.real(label)
    own, other = (ImageNoise(seed, [key], shape, purpose=purpose) for purpose in ("", "twin"))
    pair = own.initial().double().repeat(2, 1, 1, 1)
    for step in reversed(range(8)):
        pair = pair.detach().requires_grad_()
        t = torch.tensor([schedule.timesteps[step]])
        rows = [
            backbone.predict(pair[:1], t, torch.tensor([row]))
            for row in (label, backbone.null_class)
        ]
        guided = rows[1].eps + 2 * (rows[0].eps - rows[1].eps)
        eps = torch.cat(
            [torch.cat([guided[:, :channels], row.eps[:, channels:]], dim=1) for row in rows]
        )
        learned = None if rows[0].variance is None else torch.cat([row.variance for row in rows])
        x0 = schedule.predict_x0(pair, eps, step)
        seen = backbone.codec.decode(x0)
        losses = [
            misalignment(s.gradient(seen, label), r)
            for s, r in zip(students.snapshots, real, strict=True)
        ]
        (found,) = torch.autograd.grad(sum(losses) / len(losses), pair)
        c_x0, c_xt = schedule.x0_coefficient[step], schedule.x_t_coefficient[step]
        before = (c_x0 * x0 + c_xt * pair).detach()
        if step:
            sigma = (0.5 * schedule.log_variance(learned, step)).exp()
            before = before + sigma * torch.cat([own.step(), other.step()])
        if 2 <= step <= 6:
            size = 20.0 * 0.0015 * rms(eps[:1]) * (1 - schedule.abar[step].item()) ** 0.5
            before[:1] -= size * found[:1] / rms(found[:1])
        pair = before
    return pair[:1].detach()


@pytest.mark.parametrize(
    ("backbone", "channels", "variance"), [(toy(), 3, "fixed"), (TwoChannels(), 1, "learned")]
)
def test_with_a_twin_an_image_is_the_released_pairs_first_row(backbone, channels, variance):
    def made(rows, twin=True, wrap=lambda guidance: guidance, seed=3):
        batch = replace(batch_of(rows), seed=seed)
        batch = replace(batch, modes=torch.zeros(len(rows), *backbone.latent_shape).double())
        guidance = influence(twin=twin)
        guidance.fit(None, [], backbone, None)
        noise = ImageNoise(seed, batch.images, backbone.latent_shape)
        return DDPM(8, 2.0, channels, variance=variance)(backbone, batch, wrap(guidance), noise)

    found, alone = made([4]), influence()
    alone.fit(None, [], backbone, None)
    expected = released_pair(backbone, alone, ("1", 4), 1, 3, channels)
    assert torch.allclose(found, expected, atol=1e-10)
    assert (found - made([4], twin=False)).abs().max() > 1e-3
    assert torch.equal(made([4], wrap=lambda own: Sum(mode=NoGuidance(), influence=own)), found)
    assert torch.allclose(made([7, 4, 5])[1:2], found, atol=1e-9)


@pytest.mark.parametrize("kind", [DDIM, ReleasedDDIM])
def test_a_twin_without_noise_is_its_row_until_guidance_parts_them(kind):
    states = []
    sample(influence(twin=True, low=2, high=4), (4, 5), kind, on_step=states.append)
    apart = {s.step: (s.x0_twin - s.x0_hat).abs().max().item() for s in states}
    assert all(apart[step] < 1e-12 for step in (7, 6, 5, 4))
    assert all(apart[step] > 1e-6 for step in (3, 2, 1, 0))
    states.clear()
    sample(influence(), (4,), kind, on_step=states.append)
    assert all(s.x0_twin is None for s in states)


@pytest.mark.parametrize("student", ["convnet2_w4", "convnet1_w8", "vit_p2_w64"])
def test_the_shift_has_its_size_whatever_the_student(student):
    guidance, rows = influence(k=5.0, student=student), (0, 1, 5)
    state = state_at(guidance, rows, 5)
    with torch.no_grad():
        shift = guidance.bind(batch_of(rows))(state) * state.gain
    expected = 0.0015 * 5 * rms(state.eps) * (1 - state.abar) ** 0.5
    assert torch.allclose(rms(shift), expected, rtol=1e-5)


def test_a_loss_of_another_size_changes_nothing():
    found, eps = draw(2, 1, 4, 4), draw(2, 1, 4, 4, seed=1)
    assert torch.allclose(normalised(1000 * found, eps, 0.3), normalised(found, eps, 0.3))
    assert torch.equal(normalised(0 * found, eps, 0.3), 0 * found)  # no direction, no shift


def test_an_image_that_is_the_only_real_one_is_left_alone():
    """Its loss is zero, and the gradient before normalisation is, up to the released floor."""
    guidance = influence()
    term, x0 = guidance.bind(batch_of([1])), draw(1, *SHAPE, seed=5).clamp(-1, 1)
    others = term._pull(x0, 1)
    image = PixelCodec(4).decode(x0)
    own = torch.stack([s.gradient(image, 1) for s in guidance.surrogate.snapshots])
    term.real[1] = own
    assert all(misalignment(g, g) < 1e-5 for g in own)
    assert term._pull(x0, 1).norm() < 1e-4 * others.norm()


def test_the_loss_lies_between_zero_and_two():
    for seed in range(20):
        a, b = draw(50, seed=seed), draw(50, seed=100 + seed)
        assert 0 <= misalignment(a, b) <= 2
    assert misalignment(a, a) == pytest.approx(0, abs=1e-6)
    assert misalignment(a, -a) == pytest.approx(2, abs=1e-6)


def test_only_the_window_differentiates_and_each_class_is_read_once():
    guidance = influence(low=3, high=5)
    seen = []
    sample(guidance, (0, 3, 1), on_step=seen.append)
    assert {s.step for s in seen if s.x0_hat.requires_grad} == {3, 4, 5}
    assert guidance.reach is Reach.DENOISER and sorted(guidance.surrogate.asked) == [0, 1]
    networks = [s.net for s in guidance.surrogate.snapshots]
    assert all(p.grad is None for net in networks for p in net.parameters())


def test_without_a_surrogate_it_is_refused():
    with pytest.raises(UserError, match="add surrogate=trajectory"):
        InfluenceGuidance(5.0, 0.0015, 30, 45).check(50)
    with pytest.raises(UserError, match=r"guidance \(influence\): high=45 .*<= 24"):
        InfluenceGuidance(5.0, 0.0015, 20, 45, Students()).check(25)

"""The contract of guidance that differentiates, and of guidance that looks at finished images."""

import weakref
from collections import deque

import pytest
import torch

from mgd3.backbones.contract import Prediction
from mgd3.backbones.dit import DiT
from mgd3.backbones.toy import Toy
from mgd3.data.digits import Digits
from mgd3.distillers.finished import FinishedLatents
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.distillers.image_maker import ImageMaker, Making
from mgd3.distillers.refining import NoRefinement
from mgd3.modes.finders import KMeansModes
from mgd3.runtime.compute import Compute, Work
from mgd3.runtime.errors import UserError
from mgd3.sampling.combination import Sum
from mgd3.sampling.guidance import ModeGuidance, NoGuidance, TangentModeGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDIM, DDPM, ReleasedDDIM, ReverseStep
from mgd3.sampling.starts import NoiseStart
from mgd3.sampling.terms import DenoiseState, Reach, SamplingBatch, gradient

SHAPE = (1, 4, 4)
DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"
KINDS = [DDPM, DDIM, ReleasedDDIM]
AHEAD = [Reach.CLEAN, Reach.DENOISER]


class Squares:
    """Lowers |x0_hat - 1|^2 / 2 of each row, through as much as its reach says."""

    needs_modes = False

    def __init__(self, reach, scale=0.05):
        self.reach, self.scale, self.seen = reach, scale, []

    def check(self, num_steps):
        """Anything goes."""

    def bind(self, batch):
        guidance = self

        class Term:
            def reach(self, step):
                return guidance.reach

            def __call__(self, state):
                guidance.seen.append(state)
                return -guidance.scale * gradient(
                    state, lambda: (state.x0_hat - 1).square().flatten(1).sum(dim=1) / 2
                )

        return Term()


class Away:
    """Pushes x_{t-1} away from the mean of the class's finished latents."""

    needs_modes, needs_finished = False, True

    def __init__(self, scale=0.5, block=1):
        self.scale, self.block = scale, block

    def check(self, num_steps):
        """Anything goes."""

    def bind(self, batch):
        others = [batch.finished(row) for row in range(len(batch.images))]

        def term(state):
            rows = [
                x - o.mean(dim=0) if len(o) else torch.zeros_like(x)
                for x, o in zip(state.x0_hat, others, strict=True)
            ]
            return state.from_shift(self.scale * torch.stack(rows))

        return term


class Shift:
    """Moves x_{t-1} by one and the same amount at one step."""

    needs_modes = False

    def __init__(self, amount, at):
        self.amount, self.at = amount, at

    def check(self, num_steps):
        """Anything goes."""

    def bind(self, batch):
        return lambda state: state.from_shift(
            torch.full_like(state.x0_hat, self.amount * (state.step == self.at))
        )


def toy(**options):
    return Toy(**{"image_size": 4, "mean": 0.5, "shift": 0.2, "std": 0.3} | options)


def walk(kind, steps=8):
    options = {"variance": "fixed"} if kind is DDPM else {}
    return kind(steps=steps, cfg_scale=2.0, cfg_channels=3, **options)


def sample(guidance, rows=(0, 1, 2), kind=DDPM, dtype=torch.float32, **options):
    rows = list(rows)
    batch = SamplingBatch(
        class_ids=torch.tensor([k % 2 for k in rows]),
        modes=torch.stack([torch.full(SHAPE, float(k)) for k in rows]).to(dtype),
        images=[(str(k % 2), k) for k in rows],
    )
    return walk(kind)(toy(), batch, guidance, ImageNoise(0, batch.images, SHAPE), **options)


@pytest.mark.parametrize("reach", AHEAD)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_do_not_see_each_other(kind, reach):
    together = sample(Squares(reach), (4, 7, 4), kind, torch.float64)
    apart = [sample(Squares(reach), (k,), kind, torch.float64)[0] for k in (4, 7)]
    assert torch.allclose(together, torch.stack([*apart, apart[0]]), atol=1e-12)
    assert not torch.allclose(together, sample(NoGuidance(), (4, 7, 4), kind, torch.float64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "guidance",
    [
        ModeGuidance(0.0, 0),
        Squares(Reach.NONE, 0.0),
        Squares(Reach.CLEAN, 0.0),
        Squares(Reach.DENOISER, 0.0),
        Sum(mode=ModeGuidance(0.0, 0), squares=Squares(Reach.DENOISER, 0.0)),
    ],
    ids=["mode", "none", "clean", "denoiser", "sum"],
)
def test_a_scale_of_zero_gives_plain_samples_byte_for_byte(kind, guidance):
    if getattr(guidance, "reach", None) is Reach.NONE:
        with pytest.raises(RuntimeError, match="does not require grad"):
            sample(guidance, kind=kind)
        return
    assert torch.equal(sample(guidance, kind=kind), sample(NoGuidance(), kind=kind))


@pytest.mark.parametrize("reach", AHEAD)
def test_the_gradient_is_that_of_central_differences(reach):
    """Along three random directions; with eps held constant for «clean»."""
    guidance, backbone = Squares(reach, 1.0), toy()
    sample(guidance, (3,), DDIM, torch.float64)
    state = guidance.seen[2]
    schedule = backbone.schedule.respaced(8)
    t, null = torch.tensor([state.t]), torch.tensor([backbone.null_class])

    def loss(x):
        at = x if reach is Reach.DENOISER else state.x_t.detach()
        cond, free = (backbone.predict(at, t, ids).eps for ids in (torch.tensor([1]), null))
        eps = free + 2 * (cond - free)
        return (schedule.predict_x0(x, eps, state.step) - 1).square().sum() / 2

    x = state.x_t.detach()
    found = gradient(state, lambda: (state.x0_hat - 1).square().flatten(1).sum(dim=1) / 2)
    for seed in range(3):
        way = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).double()
        way, h = way / way.norm(), 1e-5
        expected = (loss(x + h * way) - loss(x - h * way)) / (2 * h)
        assert (found * way).sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_a_reach_there_is_no_graph():
    seen = []
    sample(ModeGuidance(0.1, 2), on_step=seen.append)
    assert len(seen) == 8
    assert not any(s.x_t.requires_grad or s.x0_hat.requires_grad for s in seen)


class Kept:
    """A tensor that a graph keeps for its way back."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_lets_go_of_its_graph_before_the_next_one(kind):
    """Two of them at once would take twice the memory that a batch is sized for."""
    alive, found = weakref.WeakSet(), []

    def keep(tensor):
        alive.add(kept := Kept(tensor))
        return kept

    class Watched(Toy):
        def predict(self, x_t, t, class_ids):
            found.append(len(alive))
            return super().predict(x_t, t, class_ids)

    guidance, rows = Squares(Reach.DENOISER), [("0", 0), ("1", 1)]
    guidance.seen = deque(maxlen=0)
    batch = SamplingBatch(class_ids=torch.arange(2), modes=torch.zeros(2, *SHAPE), images=rows)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        backbone = Watched(image_size=4, mean=0.5, shift=0.2, std=0.3)
        walk(kind)(backbone, batch, guidance, ImageNoise(0, rows, SHAPE), on_step=lambda s: (
            found.append(len(alive))
        ))  # fmt: skip
    before, after = found[::2], found[1::2]
    assert before == [0] * 8 and min(after) > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at", [0, 3, 7])
def test_a_shift_moves_the_next_step_by_itself(kind, at):
    seen = []
    for guidance in (NoGuidance(), Shift(0.25, at)):
        states = []
        last = sample(guidance, kind=kind, dtype=torch.float64, on_step=states.append)
        seen.append([*(s.x_t for s in states), last])
    plain, moved = (walked[8 - at] for walked in seen)  # x after step `at`
    assert (moved - plain - 0.25).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [DDPM, DDIM])
@pytest.mark.parametrize("step", [1, 5])
def test_a_change_of_eps_does_what_another_prediction_would(kind, step):
    schedule, one = toy().schedule.respaced(8), walk(kind)
    x_t = torch.linspace(-1, 1, 16).double().view(1, *SHAPE)
    eps, change = torch.full_like(x_t, 0.3), torch.full_like(x_t, 0.1)

    def after(eps, g_t):
        prediction = Prediction(eps=eps)
        state = DenoiseState(
            step=step, num_steps=8, x_t=x_t, x0_hat=schedule.predict_x0(x_t, eps, step),
            gain=one.gain(schedule, prediction, step), eps_gain=one.eps_gain(schedule, step),
        )  # fmt: skip
        now = ReverseStep(schedule=schedule, state=state, prediction=prediction, g_t=g_t(state))
        return one.previous(now, ImageNoise(0, [("0", 0)], SHAPE))

    direct = after(eps + change, lambda state: torch.zeros_like(x_t))
    assert (direct - after(eps, lambda state: state.from_eps(change))).abs().max() < 1e-6


def distiller(tmp_path, guidance, batch_size=4, backbone=None):
    work = Work(cache=tmp_path / "cache", batch_size=batch_size, workers=1, flip="none")
    return GenerativeDistiller(
        backbone or toy(image_size=8, mean=0.0, shift=0.05),
        walk(DDIM, 4),
        guidance,
        KMeansModes(),
        work,
    )


def images(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png")}


PROVENANCE = {"method": "m", "config": {}, "identity": {}, "data": {"train": None}}


@pytest.fixture(scope="module")
def digits():
    return Digits(8)


@pytest.mark.parametrize("block", [1, 2])
def test_images_that_read_others_do_not_depend_on_the_batch(tmp_path, digits, block):
    made = []
    for batch_size in (1, 7, 64):
        out = tmp_path / str(batch_size)
        distiller(tmp_path, Away(block=block), batch_size).distill(digits, 3, 0, out, PROVENANCE)
        assert not (out / ".latents").exists()
        made.append(images(out))
    assert made[0] == made[1] == made[2] and len(made[0]) == 30
    plain = tmp_path / "plain"
    distiller(tmp_path, NoGuidance()).distill(digits, 3, 0, plain, PROVENANCE)
    same = {name for name, data in images(plain).items() if data == made[0][name]}
    first = {name for name in made[0] if int(name[-9:-4]) < block}
    assert same == first  # the first of each class read nothing


class StopError(Exception):
    """A kill in the middle of a step."""


@pytest.mark.parametrize("after", [3, 21, 33])
def test_a_run_that_is_stopped_ends_with_the_same_bytes(tmp_path, digits, after):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    distiller(tmp_path, Away()).distill(digits, 3, 0, whole, PROVENANCE)
    one, steps = distiller(tmp_path, Away()), []

    def stop(state):
        steps.append(state.step)
        if len(steps) == after:
            raise StopError

    one.on_step = stop
    with pytest.raises(StopError):
        one.distill(digits, 3, 0, stopped, PROVENANCE)
    (some := sorted(stopped.rglob("*.safetensors")))[-1:] and some[-1].write_bytes(b"torn")
    distiller(tmp_path, Away()).distill(digits, 3, 0, stopped, PROVENANCE)
    assert images(whole) == images(stopped)


def test_another_latent_moves_only_later_images_of_its_class(tmp_path):
    maker = ImageMaker(toy(), walk(DDIM), Away(), NoiseStart(), NoRefinement())
    keys = [(wnid, k) for k in range(3) for wnid in ("a", "b")]

    def made(changed=None):
        finished = FinishedLatents(None, ipc=3)
        making = Making(
            seed=0, rows={"a": 0, "b": 1}, labels={"a": 0, "b": 1}, found={}, finished=finished
        )
        found = {}
        for key in keys:
            found[key] = maker.sample([key], making)
            finished.add([key], found[key] + (key == changed))
        return found

    before, after = made(), made(("a", 1))
    moved = {key for key in keys if not torch.equal(before[key], after[key])}
    assert moved == {("a", 2)}


def test_a_round_of_candidates_reads_its_own_alone():
    """Candidate 5 of rounds of three is its round's last; a pool of one is a prefix of any."""
    assert FinishedLatents(None, ipc=3).read_by(("a", 5)) == [("a", 3), ("a", 4)]
    assert FinishedLatents(None, ipc=3).read_by(("a", 2)) == [("a", 0), ("a", 1)]
    assert FinishedLatents(None, ipc=4, block=2).read_by(("a", 3)) == [("a", 0), ("a", 1)]


def test_nothing_keeps_a_gradient_or_a_tensor_that_can_have_none(tmp_path):
    backbone = DiT(DIGITS, None, image_size=8, compute=Compute(device="cpu"))
    guidance = Squares(Reach.DENOISER, 1e-3)
    maker = ImageMaker(backbone, DDPM(4, 2.0, 3), guidance, NoiseStart(), NoRefinement())
    making = Making(seed=0, rows={"a": 0}, labels={"a": 0}, found={})
    latents = maker.sample([("a", 0), ("a", 1)], making)
    decoded = backbone.codec.decode(latents)
    network = backbone.bare.network
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    tensors = [latents, decoded, *network.parameters(), *(s.x0_hat for s in guidance.seen)]
    assert not any(t.is_inference() for t in tensors)
    assert not latents.requires_grad and all(s.x0_hat.requires_grad for s in guidance.seen)


@pytest.mark.parametrize(
    ("reach", "compute", "said"),
    [
        (Reach.DENOISER, {"precision": "float16"}, "float16"),
        (Reach.CLEAN, {"precision": "float16"}, "float16"),
        (Reach.DENOISER, {"compile": True}, "compile"),
    ],
)
def test_gradients_that_cannot_be_had_are_refused_before_sampling(
    tmp_path, digits, reach, compute, said
):
    backbone = DiT(
        DIGITS, None, image_size=8,
        compute=Compute(device="cpu", **compute),
    )  # fmt: skip
    guidance = Squares(reach)
    with pytest.raises(UserError, match=f"guidance: Squares needs gradients.*{said}"):
        distiller(tmp_path, guidance, backbone=backbone).distill(
            digits, 1, 0, tmp_path / "out", PROVENANCE
        )
    assert not (tmp_path / "out").exists() and not guidance.seen


def test_a_sum_is_what_its_parts_are():
    parts = Sum(mode=ModeGuidance(0.1, 2), tangent=TangentModeGuidance(0.1, 2, 1, 3))
    assert parts.needs_modes and not parts.needs_finished and parts.reach is Reach.NONE
    both = Sum(block=3, away=Away(), squares=Squares(Reach.CLEAN))
    assert both.needs_finished and not both.needs_modes and both.reach is Reach.CLEAN
    one, twice = (
        sample(ModeGuidance(0.1, 2)),
        sample(Sum(a=ModeGuidance(0.05, 2), b=ModeGuidance(0.05, 2))),
    )
    assert torch.allclose(one, twice, atol=1e-6)
    with pytest.raises(UserError, match="at least one part"):
        Sum()

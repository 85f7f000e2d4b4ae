"""D3HR: inversion and back, groups that match a Gaussian, and runs from them."""

import pytest
import torch
from conftest import ROOT, run

from mgd3.backbones.contract import Prediction
from mgd3.backbones.dit import DiT
from mgd3.backbones.toy import Toy
from mgd3.data.digits import Digits
from mgd3.data.inventory import take_inventory
from mgd3.modes.latents import LatentCache
from mgd3.runtime.compute import Compute, Work
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import NoGuidance
from mgd3.sampling.inversion import Inversion, InvertedClasses
from mgd3.sampling.inverted_starts import InvertedStart
from mgd3.sampling.matched_groups import exact_group, group_scores, search_group
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDIM
from mgd3.sampling.starts import NoiseStart
from mgd3.sampling.terms import SamplingBatch

DIGITS = ROOT / "mgd3/backbones/weights/dit_digits.safetensors"
PUBLISHED = {
    "level": 30, "offset": 0, "match": "search", "groups": 200, "skew": "dimension",
    "skew_weight": 0.5, "ipc": 5, "steps": 50, "cfg_scale": 4.0, "cfg_channels": 4,
}  # fmt: skip


class From(NoiseStart):
    """Begins at given latents of a given step."""

    def __init__(self, latents, level):
        self._latents, self._level = latents, level

    def steps(self, num_steps):
        return self._level + 1

    def initial(self, schedule, batch, noise):
        return self._latents


def toy():
    return Toy(image_size=8, mean=0.5, shift=0.2, std=0.3)


def there_and_back(backbone, latents, ids, cfg_scale, level=30, steps=50):
    """The RMS by which latents come back from inversion and decoding."""
    invert = Inversion(steps=steps, level=level, cfg_scale=cfg_scale, cfg_channels=4)
    x = invert(backbone, latents, ids)
    keys = [("0", k) for k in range(len(ids))]
    batch = SamplingBatch(class_ids=ids, modes=torch.zeros_like(latents), images=keys)
    noise = ImageNoise(0, keys, backbone.latent_shape)
    back = DDIM(steps, cfg_scale, 4)(backbone, batch, NoGuidance(), noise, From(x, level))
    return (back - latents).square().mean().sqrt().item()


class Constant(Toy):
    """A prediction that does not look at x: what is inverted comes back but for rounding."""

    def predict(self, x_t, t, class_ids):
        eps = torch.sin(t + class_ids % 7).to(x_t).view(-1, 1, 1, 1)
        return Prediction(eps=eps.expand_as(x_t))


def test_a_latent_comes_back_as_well_as_steps_are_fine():
    """eps is predicted at the other end of a step: the error is of first order in their length."""
    ids = torch.tensor([0, 1, 1, 0])
    draw = torch.Generator().manual_seed(0)
    latents = 0.5 + 0.2 * ids.view(-1, 1, 1, 1) + 0.3 * torch.randn(4, 1, 8, 8, generator=draw)
    plain, guided = (there_and_back(toy(), latents, ids, scale) for scale in (1.0, 4.0))
    assert plain < 0.05 < guided
    finer = there_and_back(toy(), latents, ids, 1.0, level=306, steps=500)
    assert finer < 1e-2 and finer < plain / 8
    constant = Constant(image_size=8, mean=0.5, shift=0.2, std=0.3)
    assert there_and_back(constant, latents.double(), ids, 4.0) < 1e-6


def test_a_digit_comes_back_better_without_guidance(tmp_path):
    digits, backbone = (
        Digits(8),
        DiT(str(DIGITS), None, image_size=8, compute=Compute(device="cpu")),
    )
    inventory = take_inventory(digits, "train", 1, tmp_path, 1)
    real = LatentCache(tmp_path, backbone.codec, "none").latents(digits.classes[3], inventory[3])
    ids = torch.full((4,), backbone.class_ids(digits.classes)[3])
    plain, guided = (there_and_back(backbone, real[:4], ids, scale) for scale in (1.0, 4.0))
    assert plain < 0.05 < guided < 0.2


class Prompted(Toy):
    """Told of a class by its name, as text-to-image backbones are; its network stays the same."""

    words = "a photo"

    def told_of(self, class_ids):
        return f"{self.words} {class_ids}"


def test_a_class_is_inverted_again_once_the_network_is_told_something_else(tmp_path):
    digits, work = (
        Digits(8, classes=[3, 5]),
        Work(cache=tmp_path, batch_size=4, workers=1, flip="none"),
    )
    inventory = take_inventory(digits, "train", 1, tmp_path, 1)
    backbone = Prompted(image_size=8, mean=0.5, shift=0.2, std=0.3)
    invert = Inversion(steps=5, level=2, cfg_scale=1.0, cfg_channels=1)

    def missing():
        (_, inverting) = InvertedClasses(invert, backbone, work).stages(digits, inventory)
        return not inverting.there

    assert missing()
    InvertedClasses(invert, backbone, work).fit(digits, inventory)
    assert not missing()
    backbone.words = "a drawing"
    assert missing()


MEAN = torch.linspace(-1, 1, 24)
STD = torch.linspace(0.1, 2, 24)


def searched(groups, count=5, **options):
    draw = torch.Generator().manual_seed(3)
    options = {"skew": "dimension", "skew_weight": 0.5} | options
    return search_group(MEAN, STD, count, groups, draw=draw, **options)


def score(group):
    return group_scores(group[None], MEAN, STD, "dimension", 0.5).item()


def test_one_group_is_the_first_draw_and_more_are_never_worse():
    first = searched(1)
    chunk = (1 << 22) // (5 * 24)  # drawn at a time
    drawn = torch.randn(chunk, 5, 24, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, MEAN + STD * drawn[0])
    scores = [score(searched(m)) for m in (1, 2, 3, 10, 100, 1000)]
    assert scores == sorted(scores, reverse=True) and scores[-1] < scores[0]
    assert score(searched(chunk + 1)) <= score(searched(chunk))


def test_the_group_is_better_than_random_ones():
    draw = torch.Generator().manual_seed(9)
    others = MEAN + STD * torch.randn(1000, 5, 24, generator=draw)
    scores = group_scores(others, MEAN, STD, "dimension", 0.5)
    best = searched(1000)
    assert score(best) < scores.median().item()
    assert (best.mean(dim=0) - MEAN).norm() < (STD.square().sum() / 5).sqrt()


def test_scores_are_what_the_formula_says():
    group = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [5.0, 4.0]]])
    mean, std = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    stds = torch.tensor([7.0, 3.0]).sqrt()
    off = ((2 - 1) ** 2 + 0) ** 0.5 + (stds - std).norm().item()
    third = torch.tensor([(-8 - 1 + 27) / 7**1.5, (-1 - 1 + 8) / 3**1.5]) * 3 / 2
    found = group_scores(group, mean, std, "dimension", 0.5).item()
    assert found == pytest.approx(off + 0.5 * third.norm().item(), rel=1e-5)
    two = group_scores(group, mean, std, "sample", 0.5).item()  # of two numbers: no skewness
    assert two == pytest.approx(off, rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 10])
def test_exact_draws_have_the_gaussians_mean_and_deviation(count):
    group = exact_group(MEAN, STD, count, torch.Generator().manual_seed(0))
    assert torch.allclose(group.mean(dim=0), MEAN, atol=1e-5)
    if count > 1:
        assert torch.allclose(group.std(dim=0), STD, atol=1e-5)
    assert searched(3, count).isfinite().all()


def work(tmp_path, **options):
    return Work(**{"cache": tmp_path, "batch_size": 7, "workers": 1, "flip": "none"} | options)


class Two(Digits):
    """Digits of two classes."""

    def __init__(self):
        super().__init__(8, classes=["0", "1"])


def fitted(tmp_path, backbone=None, **options):
    start, digits = InvertedStart(**PUBLISHED | {"level": 5, "steps": 10} | options), Two()
    inventory = take_inventory(digits, "train", 1, tmp_path, 1)
    start.fit(digits, inventory, backbone or toy(), work(tmp_path))
    return start, [info.wnid for info in digits.classes]


def initial(start, images, seed=0):
    shape = torch.zeros(len(images), 1, 8, 8)
    batch = SamplingBatch(class_ids=torch.zeros(len(images)), modes=shape, images=images, seed=seed)
    return start.initial(None, batch, shape)


def test_starts_depend_on_class_number_and_seed_alone(tmp_path):
    start, (a, b) = fitted(tmp_path)
    together = initial(start, [(a, 0), (b, 3), (a, 4), (a, 7)])
    again, _ = fitted(tmp_path / "other")
    apart = [initial(again, [key])[0] for key in [(a, 0), (b, 3), (a, 4), (a, 7)]]
    assert torch.equal(together, torch.stack(apart))
    assert not torch.equal(together[:1], initial(start, [(a, 0)], seed=1))
    standardised = [(start.group(w, 0, 0) - g.mean) / g.std for w, g in start._classes.items()]
    assert not torch.allclose(*standardised, atol=0.1)


class Counting(Toy):
    asked = 0

    def predict(self, x_t, t, class_ids):
        self.asked += 1
        return super().predict(x_t, t, class_ids)


def test_what_is_inverted_is_found_again_unless_something_changed(tmp_path):
    options = {"image_size": 8, "mean": 0.5, "shift": 0.2, "std": 0.3}
    first = Counting(**options)
    fitted(tmp_path, first)
    assert first.asked
    inventory = take_inventory(Two(), "train", 1, tmp_path, 1)
    start = InvertedStart(**PUBLISHED | {"level": 5, "steps": 10})
    again = Counting(**options)
    plans = [start.stages(Two(), inventory, again, work(p)) for p in (tmp_path, tmp_path / "new")]
    assert [[stage.there for stage in plan] for plan in plans] == [[True] * 2, [False] * 2]
    next((tmp_path / "inversions").glob("*.safetensors")).write_bytes(b"torn")
    for change, share in [({}, 0.5), ({}, 0), ({"std": 0.4}, 1)]:
        again = Counting(**options | change)
        fitted(tmp_path, again)
        assert again.asked == pytest.approx(share * first.asked, abs=7 * share)
    other = Counting(**options)
    fitted(tmp_path, other, cfg_scale=1.0)
    assert other.asked


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"level": 50}, r"start.level=50 is out of range; allowed: 0..49"),
        ({"level": 49, "offset": 1}, r"start.level=49 is out of range; allowed: 0..48"),
        ({"match": "x"}, r"start.match='x' is unknown. Allowed: search, exact"),
        ({"groups": 0}, r"start.groups=0 is out of range; allowed: >= 1"),
        ({"skew": "group"}, r"start.skew='group' is unknown. Allowed: dimension, sample"),
        ({"skew_weight": -1}, r"start.skew_weight=-1 is out of range"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, said):
    with pytest.raises(UserError, match=said):
        InvertedStart(**PUBLISHED | option)


def images(folder):
    (manifest,) = folder.rglob("manifest.json")
    found = {p.name + p.parent.name: p.read_bytes()
             for p in manifest.parent.glob("images/*/*.png")}  # fmt: skip
    return found, manifest.parent


QUICK = (
    "method=d3hr", "dataset=digits", "dataset.classes=[2,7]", "ipc=3", "sampler.steps=6",
    "start.level=1",
    "start.groups=50", "students=[]", "tracker=none", "report=false", "compute.device=cpu",
)  # fmt: skip


def test_a_run_and_one_that_lost_an_image_and_its_cache(tmp_path):
    done = run(tmp_path, *QUICK)
    assert done.returncode == 0, done.stderr[-1500:]
    made, folder = images(tmp_path)
    assert len(made) == 6
    next(folder.glob("images/*/00001.png")).unlink()
    (folder / "manifest.json").unlink()
    for path in (tmp_path / "cache/inversions").rglob("*.safetensors"):
        path.unlink()
    assert run(tmp_path, *QUICK).returncode == 0
    assert images(tmp_path)[0] == made


def test_a_class_of_one_image_is_refused_before_anything_is_made(tree, tmp_path):
    for k in range(1, 4):
        (tree / f"train/cat/{k}.png").unlink()
    done = run(
        tmp_path, *QUICK, "dataset=folder", f"dataset.root={tree}", "~dataset.classes",
        "dataset.student_size=16", "backbone=toy", "backbone.image_size=16", "ipc=1",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "class cat (cat) has 1 usable train image" in done.stderr

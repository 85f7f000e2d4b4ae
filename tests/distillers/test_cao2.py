"""CaO2: which candidates a judge keeps, how far latents move, runs that are stopped."""

import pytest
import torch
from conftest import ROOT, run

from mgd3.backbones.dit import DiT
from mgd3.backbones.toy import Toy
from mgd3.data.digits import Digits
from mgd3.distillers.generative import GenerativeDistiller
from mgd3.distillers.pool import Probable, TeacherCorrect
from mgd3.distillers.refining import LatentOptimisation
from mgd3.modes.finders import KMeansModes
from mgd3.runtime.compute import Compute, Work
from mgd3.runtime.errors import UserError
from mgd3.sampling.guidance import NoGuidance
from mgd3.sampling.noise import ImageNoise
from mgd3.sampling.samplers import DDIM
from mgd3.sampling.terms import SamplingBatch
from mgd3.storage.files import read_json

DIGITS = ROOT / "mgd3/backbones/weights/dit_digits.safetensors"
PUBLISHED = {
    "iterations": 100, "lr": 6e-4, "steps": 50, "upper": 11, "worst_weight": 10.0, "label": "none",
    "timestep": "matched",
}  # fmt: skip
PROVENANCE = {"method": "m", "config": {}, "identity": {}, "data": {"train": None}}


class Oracle:
    """Features that know the classes; nothing is asked of it here."""

    def fit(self, dataset, inventory):
        return self


class Blind(Oracle):
    knows_classes = False


def sure(label, margin):
    """Logits that name `label`, the more surely the larger the margin."""
    return [margin * (k == label) for k in range(3)]


def kept(order, logits, ipc=2):
    rows = torch.tensor(logits, dtype=torch.float64)
    return Probable(order, Oracle()).choose(torch.zeros(len(rows), 1), rows, label=1, ipc=ipc)


def test_the_easiest_and_the_hardest_are_disjoint_ends_of_what_is_right():
    logits = [sure(1, m) for m in (3.0, 1.0, 4.0, 2.0)]
    assert kept("descending", logits) == [2, 0] and kept("ascending", logits) == [1, 3]


def test_what_is_wrong_fills_up_in_the_same_order_however_sure():
    logits = [sure(0, 1.0), sure(1, 2.0), sure(2, 9.0), sure(0, 5.0)]
    assert kept("descending", logits, 3) == [1, 2, 3]
    assert kept("ascending", logits, 3) == [1, 0, 3]
    wrong = [sure(0, 1.0), sure(0, 2.0)]
    assert kept("descending", wrong) == [1, 0] and kept("ascending", wrong) == [0, 1]


@pytest.mark.parametrize("made", [lambda f: Probable("descending", f), TeacherCorrect])
def test_a_judge_must_know_the_classes(made):
    with pytest.raises(UserError, match=r"features=student"):
        made(None)
    with pytest.raises(
        UserError, match="Blind is no network that knows the classes; add features=student"
    ):
        made(Blind())


def digits_backbone():
    return DiT(str(DIGITS), None, image_size=8, compute=Compute(device="cpu"))


def toy():
    return Toy(image_size=8, mean=0.5, shift=0.2, std=0.3)


def refined(backbone, latents, rows=(0, 1, 2), **options):
    keys = [(str(k % 2), k) for k in rows]
    batch = SamplingBatch(
        class_ids=torch.tensor([k % 2 for k in rows]), modes=torch.zeros_like(latents), images=keys
    )
    noise = ImageNoise(0, keys, backbone.latent_shape, purpose="refine")
    return LatentOptimisation(**PUBLISHED | options)(backbone, latents, batch, noise)


@pytest.fixture(scope="module")
def samples():
    """Plain samples (3, 1, 8, 8) of two classes."""
    backbone = digits_backbone()
    keys = [(str(k % 2), k) for k in range(3)]
    batch = SamplingBatch(
        class_ids=torch.tensor([0, 1, 0]), modes=torch.zeros(3, 1, 8, 8), images=keys
    )
    noise = ImageNoise(0, keys, (1, 8, 8))
    return DDIM(10, 2.7, 3)(backbone, batch, NoGuidance(), noise)


def test_no_element_moves_by_more_than_iterations_times_the_rate(samples):
    moved = refined(digits_backbone(), samples)
    assert 0.005 < (moved - samples).abs().max() <= 100 * 6e-4 + 1e-6
    assert not moved.requires_grad and not moved.is_inference()


def test_no_iterations_leave_the_bytes(samples):
    assert torch.equal(refined(digits_backbone(), samples, iterations=0), samples)


@pytest.mark.parametrize("backbone", [toy, digits_backbone])
def test_the_loss_at_one_step_and_noise_falls(backbone, samples):
    backbone = backbone()
    ids, null = torch.tensor([0, 1, 0]), backbone.null_class
    schedule = backbone.schedule.respaced(50)
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
    stage = LatentOptimisation(**PUBLISHED | {"upper": 1, "lr": 2e-3})

    def loss(z):
        ones = torch.ones(3, dtype=torch.long)
        with torch.no_grad():
            return stage.loss(
                backbone,
                z,
                noise,
                schedule.abar[ones],
                ones * schedule.timesteps[1],
                ids * 0 + null,
            )

    moved = stage._moved(
        backbone, schedule, samples, noise, torch.ones(3, 100, dtype=torch.long), ids * 0 + null
    )
    assert (loss(moved) < loss(samples)).all()


def test_rows_do_not_see_each_other(samples):
    x = samples.double()
    together = refined(toy(), x, iterations=20)
    apart = [refined(toy(), x[k : k + 1], (k,), iterations=20) for k in range(3)]
    assert torch.allclose(together, torch.cat(apart), atol=1e-12)
    many = x[[0, 1, 2] * 4]  # more than one part
    assert torch.equal(refined(toy(), many, range(12), iterations=3)[:3], refined(
        toy(), x, iterations=3))  # fmt: skip


class Watched(Toy):
    """Notes the timesteps and rows that it is asked for."""

    def predict(self, x_t, t, class_ids):
        self.asked = [*getattr(self, "asked", ()), (t.tolist(), class_ids.tolist())]
        return super().predict(x_t, t, class_ids)


@pytest.mark.parametrize("timestep", ["matched", "released"])
@pytest.mark.parametrize("label", ["none", "class"])
def test_the_network_is_told_what_the_options_say(samples, timestep, label):
    backbone = Watched(image_size=8, mean=0.5, shift=0.2, std=0.3)
    refined(backbone, samples, iterations=60, timestep=timestep, label=label)
    times = {t for row, _ in backbone.asked for t in row}
    steps = range(1, 12)
    respaced = backbone.schedule.respaced(50).timesteps
    assert times == ({respaced[j] for j in steps} if timestep == "matched" else set(steps))
    assert respaced[1] == 20 and respaced[11] == 224
    rows = {tuple(ids) for _, ids in backbone.asked}
    assert rows == ({(1000, 1000, 1000)} if label == "none" else {(0, 1, 0)})


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"iterations": -1}, r"refine.iterations=-1 is out of range; allowed: >= 0"),
        ({"lr": "x"}, r"refine.lr='x' is not a number"),
        ({"upper": 50}, r"refine.upper=50 is out of range; allowed: 1..49"),
        ({"label": "null"}, r"refine.label='null' is unknown. .*Allowed: none, class"),
        ({"timestep": "x"}, r"refine.timestep='x' is unknown. Allowed: matched, released"),
    ],
)
def test_options_that_make_no_sense_are_refused(option, said):
    with pytest.raises(UserError, match=said):
        LatentOptimisation(**PUBLISHED | option)


def distiller(tmp_path, refine, backbone=None, pool=2):
    return GenerativeDistiller(
        backbone or toy(), DDIM(4, 2.7, 3), NoGuidance(), KMeansModes(),
        Work(cache=tmp_path / "cache", batch_size=7, workers=1, flip="none"),
        pool=pool, refine=refine,
    )  # fmt: skip


@pytest.mark.parametrize("compute", [{"precision": "float16"}, {"compile": True}])
def test_gradients_that_cannot_be_had_are_refused_before_sampling(tmp_path, compute):
    backbone = DiT(str(DIGITS), None, image_size=8, compute=Compute(device="cpu", **compute))
    one = distiller(tmp_path, LatentOptimisation(**PUBLISHED), backbone)
    with pytest.raises(UserError, match="refine: LatentOptimisation needs gradients"):
        one.distill(Digits(8), 1, 0, tmp_path / "out", PROVENANCE)
    with pytest.raises(UserError, match="refine: LatentOptimisation needs gradients"):
        one.stages(Digits(8), 1, tmp_path / "out", [])  # nor is it planned
    assert not (tmp_path / "out").exists()


class StopError(Exception):
    """A kill between two images."""


class Counting(LatentOptimisation):
    """Counts the images that it refines; stops before one."""

    def __init__(self, stop_at=None):
        super().__init__(**PUBLISHED | {"iterations": 2})
        self.done, self.stop_at = [], stop_at

    def __call__(self, backbone, latents, batch, noise):
        if self.stop_at is not None and len(self.done) >= self.stop_at:
            raise StopError
        self.done += batch.images
        return super().__call__(backbone, latents, batch, noise)


def images(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.glob("images/*/*.png")}


@pytest.mark.parametrize("pool", [1, 2])
def test_a_stopped_run_refines_what_is_left_alone_and_ends_with_the_same_bytes(tmp_path, pool):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    one = Counting()
    distiller(tmp_path, one, pool=pool).distill(Digits(8), 3, 0, whole, PROVENANCE)
    assert len(one.done) == 30
    broken = Counting(stop_at=10)
    with pytest.raises(StopError):
        distiller(tmp_path, broken, pool=pool).distill(Digits(8), 3, 0, stopped, PROVENANCE)
    rest = Counting()
    distiller(tmp_path, rest, pool=pool).distill(Digits(8), 3, 0, stopped, PROVENANCE)
    assert images(whole) == images(stopped) and len(images(whole)) == 30
    # a batch with a missing image is made again whole, others are left alone
    assert set(broken.done) | set(rest.done) == set(one.done) and len(rest.done) < 30
    again = Counting()
    distiller(tmp_path, again, pool=pool).distill(Digits(8), 3, 0, stopped, PROVENANCE)
    assert not again.done


def test_a_whole_run_of_both_presets(tmp_path):
    quick = (
        "tracker=none", "report=false", "features.epochs=1", "features.student=convnet2_w8",
        "students=[]", "compute.device=cpu", "ipc=2", "sampler.steps=4", "refine.iterations=3",
    )  # fmt: skip
    for method in ("cao2", "mgd3_cao2"):
        done = run(tmp_path, *quick, f"method={method}")
        assert done.returncode == 0, done.stderr[-1500:]
    for method in ("cao2", "mgd3_cao2"):
        (manifest,) = (tmp_path / f"runs/digits/{method}").rglob("manifest.json")
        entries = read_json(manifest)["images"]
        assert len(entries) == 20
        streams = {entry["noise_stream"] for entry in entries}
        assert len(streams) == 20 and {int(s.split("/")[2]) for s in streams} <= {0, 1, 2, 3}
        for entry in entries:
            _, wnid, stream = entry["noise_stream"].split("/")
            candidate = manifest.parent / f".pool/images/{wnid}/{int(stream):05d}.png"
            made = manifest.parent / entry["file"]
            assert candidate.is_file() and made.is_file()

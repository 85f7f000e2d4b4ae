"""Training a backbone: the loss's closed forms, and resumption that changes nothing."""

import dataclasses
import json
import math
import os
import signal
import sys
import threading

import pytest
import torch
from conftest import run

from mgd3.backbones.schedule import NoiseSchedule, linear_alphas_cumprod
from mgd3.backbones.weights.dit_weights import build_network
from mgd3.finetuning.from_scratch import Trainer, TrainSettings
from mgd3.finetuning.losses import add_noise, diffusion_loss, variational_bound
from mgd3.runtime.errors import UserError
from mgd3.runtime.stopping import Stopped, listen
from mgd3.storage.tensors import load_tensors

SETTINGS = TrainSettings(
    steps=6, batch_size=4, lr=1e-3, warmup_steps=2, weight_decay=0.01, ema_decay=0.9,
    label_dropout=0.5, precision="float32", seed=0, checkpoint_steps=3,
)  # fmt: skip


@pytest.fixture
def schedule():
    return NoiseSchedule(alphas_cumprod=linear_alphas_cumprod()).respaced(1000)


def test_a_perfect_network_has_no_loss(schedule):
    x0 = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    eps, t = torch.randn(x0.shape), torch.tensor([1, 300, 999])
    x_t = add_noise(x0, eps, t, schedule)
    lower_bound = torch.full_like(eps, -1.0)  # the true posterior variance
    out = torch.cat([eps, lower_bound], dim=1)
    assert diffusion_loss(out, x0, x_t, eps, t, schedule).abs().max() < 1e-4
    wrong = torch.cat([eps + 1.0, lower_bound], dim=1)
    assert (diffusion_loss(wrong, x0, x_t, eps, t, schedule) > 1).all()


def test_the_bound_is_a_gaussian_kl_in_bits(schedule):
    x0, t = torch.zeros(1, 1, 1, 1), torch.tensor([500])
    eps = torch.ones(1, 1, 1, 1)
    x_t = add_noise(x0, eps, t, schedule)
    bound = variational_bound(eps + 0.3, torch.ones_like(eps), x0, x_t, t, schedule)
    low, high = schedule.log_variance_min[500], schedule.log_variance_max[500]
    abar = schedule.abar[500]
    shift = schedule.x0_coefficient[500] * math.sqrt((1 - abar) / abar) * 0.3
    p, q = (torch.distributions.Normal(0.0, (0.5 * v).exp()) for v in (low, high))
    kl = torch.distributions.kl_divergence(p, torch.distributions.Normal(shift, q.scale))
    assert bound.item() == pytest.approx(kl.item() / math.log(2), rel=1e-4)


def test_only_the_variance_learns_from_the_bound(schedule):
    x0, t = torch.zeros(1, 1, 2, 2), torch.tensor([500])
    out = torch.zeros(1, 2, 2, 2, requires_grad=True)
    eps = torch.ones_like(x0)
    diffusion_loss(out, x0, add_noise(x0, eps, t, schedule), eps, t, schedule).sum().backward()
    assert torch.allclose(out.grad[:, :1], torch.full((1, 1, 2, 2), -2 / 4))
    assert out.grad[:, 1:].abs().min() > 0


def test_the_decoder_term_is_a_probability(schedule):
    """At t = 0 the likelihoods of all 256 levels, open at both ends, sum to one."""
    levels = (torch.arange(256) / 127.5 - 1).view(256, 1, 1, 1)
    t = torch.zeros(256, dtype=torch.long)
    x_t = torch.full_like(levels, 0.1)
    bits = variational_bound(torch.zeros_like(levels), levels * 0, levels, x_t, t, schedule)
    assert (2.0 ** -bits.double()).sum() == pytest.approx(1.0, abs=1e-3)


def trainer(path, settings=SETTINGS, **options):
    torch.manual_seed(0)
    network = build_network(
        input_size=4,
        patch_size=2,
        in_channels=1,
        hidden_size=16,
        depth=1,
        num_heads=2,
        num_classes=3,
    )
    return Trainer(network, settings, path, data="d", **options)


def latents():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(12, 1, 4, 4, generator=draw), torch.arange(12) % 3


def test_an_interrupted_training_ends_as_an_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train(*latents(), lambda t: None)

    class KilledError(Exception):
        pass

    def kill_at_the_end(t):
        if t.step == 6:
            raise KilledError

    with pytest.raises(KilledError):
        trainer(tmp_path / "cut").train(*latents(), kill_at_the_end)
    resumed = trainer(tmp_path / "cut")
    assert resumed.step == 3
    resumed.train(*latents(), lambda t: None)
    ours, theirs = load_tensors(tmp_path / "cut"), load_tensors(tmp_path / "whole")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_a_compiled_training_runs_what_was_compiled_to_the_same_weights(tmp_path, graphs):
    trainer(tmp_path / "plain").train(*latents(), lambda t: None)
    assert not graphs
    trainer(tmp_path / "compiled", compiled=True).train(*latents(), lambda t: None)
    assert graphs
    ours, theirs = (load_tensors(tmp_path / name) for name in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-5) for k in theirs)


@pytest.fixture
def listening():
    """As a script listens to signals, whatever pytest does before and after."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hook = sys.excepthook
    listen()
    yield
    listen()  # forgets what came
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.excepthook = hook


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_step_loses_none(tmp_path, listening, number):
    endless = dataclasses.replace(SETTINGS, steps=10**6, checkpoint_steps=10**6)
    stopped = trainer(tmp_path / "x", endless)
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    with pytest.raises(Stopped):
        stopped.train(*latents(), lambda t: None)
    assert trainer(tmp_path / "x", endless).step == stopped.step > 0


def test_a_signal_does_not_wait_for_pictures(tmp_path, listening):
    def pictures(t):
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal has waited")

    with pytest.raises(Stopped):
        trainer(tmp_path / "x").train(*latents(), lambda t: None, pictures)
    assert trainer(tmp_path / "x").step == 3  # what they show was written before


def test_the_average_is_in_the_network_only_while_asked(tmp_path):
    trained = trainer(tmp_path / "x")
    trained.train(*latents(), lambda t: None)
    name, parameter = next(iter(trained.state.parameters.items()))
    current, average = parameter.detach().clone(), trained.state.average[name].clone()
    assert not torch.equal(current, average)
    with trained.state.averaged():
        assert torch.equal(parameter, average)
    assert torch.equal(parameter, current)
    assert torch.equal(trained.state.average[name], average)


def test_a_diverged_training_stops(tmp_path):
    bad, labels = latents()
    bad[:] = float("inf")
    with pytest.raises(UserError, match=r"training loss is .*train\.lr"):
        trainer(tmp_path / "x").train(bad, labels, lambda t: None)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    trainer(tmp_path / "x").train(*latents(), lambda t: None)
    with pytest.raises(UserError, match="made from other settings; delete it"):
        trainer(tmp_path / "x", dataclasses.replace(SETTINGS, lr=0.5))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"precision": "half"}, r"compute\.training_precision='half'"),
        ({"warmup_steps": "abc"}, r"train\.warmup_steps='abc' is not an integer"),
        ({"weight_decay": -1}, r"train\.weight_decay=-1 is out of range"),
        ({"seed": -3}, r"train\.seed=-3 is out of range"),
    ],
)
def test_wrong_settings_are_named(wrong, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(SETTINGS, **wrong)


def test_a_backbone_trained_on_a_folder_distils_that_folder(tree, tmp_path):
    """The documented way for one's own images, in seconds: train, then run with the same keys."""
    of_folder = ("dataset=folder", f"dataset.root={tree}", "compute.device=cpu")
    own = (*of_folder, "backbone.vae=null", "backbone.image_size=16", "backbone.num_heads=2")
    small = ("train.hidden_size=32", "train.depth=1", "train.steps=4", "train.checkpoint_steps=2")
    check = ("judge=convnet2_w8", "protocol.epochs_by_ipc=[[null,2]]", "train.mirror=true")
    train = (*own, *small, *check)
    trained = run(tmp_path, *train, script="scripts/train_backbone.py")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("samples after step 4") == 1, (
        "the judged samples are the drawn ones"
    )
    assert "samples teach " in trained.stdout and "random real images" in trained.stdout
    aside = tmp_path / "weights/folder.training"
    assert {"samples.png", "loss.png", "judgement-4.json"} <= {f.name for f in aside.iterdir()}
    judgement = json.loads((aside / "judgement-4.json").read_text())
    assert judgement["per_class"] == 4 and judgement["chance"] == 50
    again = run(tmp_path, *train, script="scripts/train_backbone.py")
    assert again.returncode == 0 and "samples teach" not in again.stdout  # all was there
    done = run(
        tmp_path, *own, "backbone=dit_latent", "ipc=2", "sampler.steps=4", "students=convnet2_w8",
        "protocol.epochs_by_ipc=[[null,2]]", "tracker=none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("images/dog/*.png"))) == 2
    (manifest,) = tmp_path.rglob("manifest.json")
    assert json.loads(manifest.read_text())["config"]["guidance"]["stop_t"] == 2  # half of 4
    assert "16 px" in done.stdout or list(tmp_path.rglob("report.html"))

"""Fine-tuning: losses by hand, memories by brute force, and trainings that survive anything."""

import os
from dataclasses import asdict

import pytest
import torch
from conftest import run
from networks import small_vae
from PIL import Image
from support import composed

from mgd3.backbones.codecs import make_codec
from mgd3.backbones.dit import DiT
from mgd3.backbones.toy import Toy
from mgd3.backbones.weights.dit_weights import build_network
from mgd3.config.build import build
from mgd3.data.digits import Digits
from mgd3.finetuning.difffit import DiffFit
from mgd3.finetuning.inputs import TrainingLatents
from mgd3.finetuning.memories import (
    LatentMemory,
    cosines,
    diversity_loss,
    representativeness_loss,
    rows_by_class,
)
from mgd3.finetuning.tuning import FineTuning
from mgd3.runtime.compute import Compute, Work
from mgd3.runtime.errors import UserError
from mgd3.runtime.seeding import stream
from mgd3.storage.tensors import load_tensors

DIGITS = "mgd3/backbones/weights/dit_digits.safetensors"


def latents(*vectors):
    """Latents (B, 1, 1, 2) from plane vectors."""
    return torch.tensor(vectors, dtype=torch.float32).view(-1, 1, 1, 2)


def memory(**items):
    made = LatentMemory(8, "fifo")
    for label, vectors in items.items():
        made.extend(int(label.removeprefix("c")), latents(*vectors))
    return made


def test_losses_by_hand():
    x0_hat, labels = latents((1, 0), (0, 2), (3, 0)), torch.tensor([0, 0, 1])
    real = memory(c0=[(1, 0), (1, 1)], c1=[(-1, 0)])
    # class 0: the smallest cosine of (1,0), (0,2) with (1,0), (1,1) is 0; class 1: -1
    assert representativeness_loss(x0_hat, rows_by_class(labels), real).item() == pytest.approx(
        (1 + 2) / 2
    )
    # class 0: the largest is 1; class 1: -1
    assert diversity_loss(x0_hat, rows_by_class(labels), real).item() == pytest.approx((1 - 1) / 2)


def test_a_class_without_a_memory_counts_in_the_mean_alone():
    x0_hat, labels = latents((1, 0), (0, 1)), torch.tensor([0, 1])
    assert representativeness_loss(x0_hat, rows_by_class(labels), memory()).item() == 0
    half = representativeness_loss(x0_hat, rows_by_class(labels), memory(c1=[(1, 0)])).item()
    assert half == pytest.approx((1 - 0) / 2)


def test_gradients_flow_through_the_estimate_and_not_into_memories():
    x0_hat = latents((1.0, 0.5)).requires_grad_()
    real = memory(c0=[(0, 1)])
    representativeness_loss(x0_hat, rows_by_class(torch.tensor([0])), real).backward()
    assert x0_hat.grad[0, 0, 0, 1] < 0  # towards the memory's item
    real.extend(0, x0_hat)
    assert not real.items[0].requires_grad


@pytest.mark.parametrize("policy", ["fifo", "max_redundancy", "min_redundancy"])
def test_memories_against_brute_force(policy):
    draw = torch.Generator().manual_seed(0)
    made, expected = LatentMemory(5, policy), []
    for _ in range(6):
        new = torch.randn(3, 2, 2, 2, generator=draw)
        made.extend(7, new)
        expected += list(new)
        while len(expected) > 5:
            sums = [
                sum(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for b in expected)
                for a in expected
            ]
            victim = {
                "fifo": 0,
                "max_redundancy": max(range(len(sums)), key=lambda i: sums[i]),
                "min_redundancy": min(range(len(sums)), key=lambda i: sums[i]),
            }[policy]
            del expected[victim]
    assert torch.equal(made.items[7], torch.stack(expected))
    again = LatentMemory(5, policy)
    again.restore("m", made.state("m"), torch.device("cpu"))
    assert torch.equal(again.items[7], made.items[7])


def test_the_released_sum_counts_earlier_classes_more_often():
    x0_hat = latents((1, 0), (0, 1), (1, 1))
    labels, real = torch.tensor([0, 1, 2]), memory(c0=[(0, 1)], c1=[(0, 1)], c2=[(1, 0)])
    terms = [1 - 0, 1 - 1, 1 - 0.5**0.5]  # of the classes 0, 1, 2
    paper = representativeness_loss(x0_hat, rows_by_class(labels), real).item()
    assert paper == pytest.approx(sum(terms) / 3)
    released = representativeness_loss(x0_hat, rows_by_class(labels), real, "released").item()
    assert released == pytest.approx((3 * terms[0] + 2 * terms[1] + terms[2]) / 3)
    # a class without a memory has its place in the loop all the same
    gone = memory(c0=[(0, 1)], c2=[(1, 0)])
    assert diversity_loss(x0_hat, rows_by_class(labels), gone, "released").item() == pytest.approx(
        (3 * 0 + 1 * 0.5**0.5) / 3
    )


def test_the_released_sum_weighs_eight_of_ten_classes_as_much_as_arithmetic_says():
    """K distinct classes of 8 draws from 10; weights (K - i + 1)/K against 1/K: (K + 1)/2 times."""
    draw, found = torch.Generator().manual_seed(0), []
    held = memory(**{f"c{label}": [(1, 0)] for label in range(10)})
    for _ in range(2000):
        labels = torch.randint(10, (8,), generator=draw)
        x0_hat = latents(*[(1, 0)] * 8)  # every class's term is 1
        found.append(diversity_loss(x0_hat, rows_by_class(labels), held, "released").item())
    expected = (10 * (1 - 0.9**8) + 1) / 2
    assert expected == pytest.approx(3.348, abs=1e-3)
    assert sum(found) / len(found) == pytest.approx(expected, abs=0.05)


def test_new_items_may_wait_for_the_end_of_the_epoch():
    waiting, at_once = LatentMemory(4, "fifo", "epoch"), LatentMemory(4, "fifo")
    for k in range(3):
        for made in (waiting, at_once):
            made.extend(0, latents((k, 1), (k, 2)))
        assert 0 not in waiting.items
    kept = LatentMemory(4, "fifo", "epoch")
    kept.restore("m", waiting.state("m"), torch.device("cpu"))  # of a killed training
    for made in (waiting, kept):
        made.end_epoch()
        assert torch.equal(made.items[0], at_once.items[0])
        assert not [key for key in made.state("m") if "waiting" in key]


def test_the_released_inputs_are_drawn_and_mirrored_at_each_visit():
    mean, std = torch.zeros(4, 1, 2, 2), torch.full((4, 1, 2, 2), 0.5)
    other = torch.full((4, 1, 2, 2), 10.0), torch.full((4, 1, 2, 2), 0.25)
    rows, draw = torch.arange(4).repeat(2000), torch.Generator().manual_seed(0)
    seen = TrainingLatents(mean, std, other, 0.5).at(rows, draw)
    turned = seen.flatten(1).mean(1) > 5
    assert turned.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert seen[~turned].std().item() == pytest.approx(0.5, abs=0.01)
    assert seen[turned].std().item() == pytest.approx(0.25, abs=0.01)
    assert seen[turned].mean().item() == pytest.approx(10, abs=0.01)
    fixed = TrainingLatents(mean, None, None, 0.0)
    assert torch.equal(fixed.at(rows, draw), mean[rows])


def test_moments_are_the_posteriors(tmp_path):
    small_vae(tmp_path / "vae")
    codec = make_codec(str(tmp_path / "vae"), 32, compute=Compute(device="cpu"))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    mean, std = codec.moments(images)
    assert torch.equal(mean, codec.encode(images, ["a", "b", "c"]))
    sampling = make_codec(str(tmp_path / "vae"), 32, "sample", Compute(device="cpu"))
    drawn = sampling.encode(images, ["a", "b", "c"])
    noise = torch.stack([torch.randn(4, 4, 4, generator=stream("latent", k)) for k in "abc"])
    assert torch.allclose(drawn, mean + std * noise, atol=1e-6) and std.min() > 0
    grey = make_codec(None, 8)
    mean, std = grey.moments(torch.ones(2, 3, 8, 8))
    assert mean.shape == std.shape == (2, 1, 8, 8) and not std.any()


def test_another_vae_may_encode_for_fine_tuning(tmp_path):
    small_vae(tmp_path / "one")
    torch.manual_seed(1)
    two = small_vae(tmp_path / "two")
    backbone = DiT(DIGITS, str(tmp_path / "one"), 64, finetuning_vae=str(tmp_path / "two"))
    assert backbone.finetuning_codec is not backbone.codec
    image = torch.zeros(1, 3, 64, 64)
    encoded = two.encode(image).latent_dist.mean * two.config.scaling_factor
    assert torch.allclose(backbone.finetuning_codec.moments(image)[0], encoded, atol=1e-6)
    alone = DiT(DIGITS, str(tmp_path / "one"), 64)
    assert alone.finetuning_codec is alone.codec


def test_a_training_ends_at_the_released_checkpoint(tmp_path):
    backbone, dataset = digits_backbone(), Digits(8, classes=[0, 1])
    made = {}
    for name, options in (("all", {}), ("some", {"max_steps": 2}), ("fewer", {"max_steps": 99})):
        tune = tuning("plain", batch_size=64, **options)
        (phase,) = tune(backbone, dataset, work(tmp_path))
        made[name] = load_tensors(phase.weights)
    first = next(iter(made["all"]))
    assert torch.equal(made["all"][first], made["fewer"][first])  # three steps are an epoch here
    assert not torch.equal(made["all"][first], made["some"][first])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_real": 0}, r"finetune\.memory_real=0 is out of range; allowed: >= 1"),
        ({"memory_generated": 0}, r"finetune\.memory_generated=0 is out of range"),
        ({"memory_policy": "lru"}, r"memory_policy='lru' .*fifo, max_redundancy"),
        ({"memory_update": "step"}, r"memory_update='step' is unknown.*batch, epoch"),
        ({"loss_sum": "mean"}, r"loss_sum='mean' is unknown.*paper, released"),
        ({"latents": "mode"}, r"finetune\.latents='mode' is unknown.*mean, sample"),
        ({"flip": 2}, r"finetune\.flip=2 is out of range; allowed: 0..1"),
        ({"max_steps": 0}, r"finetune\.max_steps=0 is out of range"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        tuning("minimax", **options)


def small_network():
    torch.manual_seed(0)
    network = build_network(4, 2, 1, hidden_size=16, depth=4, num_heads=2, num_classes=3).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


@torch.no_grad()
def test_folded_scales_are_the_same_network():
    network, x = small_network(), torch.randn(2, 1, 4, 4)
    t, y = torch.tensor([3, 900]), torch.tensor([0, 2])
    fit = DiffFit(network)
    plain = network(x, timestep=t, class_labels=y).sample
    with fit.training():
        assert torch.equal(network(x, timestep=t, class_labels=y).sample, plain)
        for gamma in fit.gammas.values():
            gamma.mul_(torch.rand_like(gamma) + 0.5)
        scaled = network(x, timestep=t, class_labels=y).sample
    assert not torch.allclose(scaled, plain, atol=1e-3)
    fit.fold()
    assert torch.allclose(network(x, timestep=t, class_labels=y).sample, scaled, atol=1e-5)


def test_biases_the_class_table_and_scales_are_trained():
    network = small_network()
    trained = DiffFit(network).parameters()
    kinds = {name.split(".")[0] if "gamma" in name else name.split(".")[-1] for name in trained}
    assert kinds == {"gamma", "bias", "weight"}
    assert [n for n in trained if n.endswith("weight")] == [
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    ]
    assert {n.split(".")[1] for n in trained if "gamma" in n} == {"0", "1"}  # of four blocks
    assert sum(p.numel() for p in trained.values()) < 0.2 * sum(
        p.numel() for p in network.parameters()
    )


def tuning(name="minimax", precision="float32", **options):
    quick = {"epochs": 1, "batch_size": 64, "ema_decay": 0.5, "checkpoint_steps": 3} | options
    overrides = [f"finetune.{k}={v}" for k, v in quick.items()]
    return build(composed(f"finetune={name}", *overrides), "finetune", precision=precision)


def digits_backbone():
    return DiT(DIGITS, vae=None, image_size=8, compute=Compute(device="cpu"))


def work(tmp_path):
    return Work(cache=tmp_path / "cache", batch_size=50, workers=1, flip="none")


@pytest.mark.parametrize("name", ["plain", "minimax", "self_adaptive_memory"])
def test_weights_are_made_once_applied_and_taken_back(name, tmp_path):
    backbone = digits_backbone()
    before = {k: v.clone() for k, v in backbone.bare.network.state_dict().items()}
    (phase,) = tuning(name)(backbone, Digits(8), work(tmp_path))
    with Image.open(phase.weights.with_suffix(".loss.png")) as curve:
        assert curve.size[0] > curve.size[1] > 100
    stamp = phase.weights.stat().st_mtime_ns
    (again,) = tuning(name)(backbone, Digits(8), work(tmp_path))
    assert again.weights == phase.weights and phase.weights.stat().st_mtime_ns == stamp
    network = backbone.bare.network
    with phase.applied(backbone):
        changed = [k for k, v in network.state_dict().items() if not torch.equal(v, before[k])]
        assert "transformer_blocks.0.attn1.to_q.weight" in changed  # by its scale
        assert "transformer_blocks.5.attn1.to_q.weight" not in changed  # of the second half
        assert "transformer_blocks.5.attn1.to_q.bias" in changed
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not any(p.requires_grad for p in network.parameters())


def test_large_sets_are_trained_in_phases(tmp_path):
    phases = tuning(classes_per_phase=4)(digits_backbone(), Digits(8), work(tmp_path))
    assert [[c.wnid for c in p.classes] for p in phases] == [
        list("0123"), list("4567"), list("89")
    ]  # fmt: skip
    assert len({p.weights for p in phases}) == 3
    table = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    original = digits_backbone().bare.network.state_dict()[table]
    moved = (load_tensors(phases[2].weights)[table] - original).abs().amax(dim=1)
    assert moved[[8, 9]].min() > 100 * moved[:8].max()  # AdamW moves only rows with a gradient


class KilledError(BaseException):
    """Nothing that the program catches."""


class Dying(FineTuning):
    """Ends in its ninth step."""

    def _loss(self, backbone, schedule, x0, labels, step, *memories):
        if step == 8:
            raise KilledError
        return super()._loss(backbone, schedule, x0, labels, step, *memories)


@pytest.mark.parametrize("update", ["batch", "epoch"])
def test_an_interrupted_fine_tuning_ends_as_an_uninterrupted_one(update, tmp_path):
    """Images drawn at each visit, memories of two sizes, killed in the middle of an epoch."""
    rule = tuning(memory_real=4, memory_generated=3, memory_update=update, flip=0.5)
    (whole,) = rule(digits_backbone(), Digits(8), work(tmp_path / "whole"))
    with pytest.raises(KilledError):
        Dying(**asdict(rule))(digits_backbone(), Digits(8), work(tmp_path / "cut"))
    (checkpoint,) = (tmp_path / "cut").rglob("*.checkpoint")
    assert load_tensors(checkpoint)["step"] == 6
    (resumed,) = rule(digits_backbone(), Digits(8), work(tmp_path / "cut"))
    ours, theirs = load_tensors(resumed.weights), load_tensors(whole.weights)
    assert all(torch.equal(ours[k], v) for k, v in theirs.items())
    assert not list((tmp_path / "cut").rglob("*.checkpoint"))


def test_a_killed_run_fine_tunes_to_the_same_images(tmp_path, monkeypatch):
    options = (
        "method=minimax", "dataset.classes=[0,1]",
        "finetune.epochs=3", "finetune.batch_size=32", "ipc=1",
        "finetune.checkpoint_steps=5", "sampler.steps=3", "tracker=none", "report=false",
        "students=[convnet2_w8]", "protocol.epochs_by_ipc=[[null,1]]", "compute.device=cpu",
    )  # fmt: skip
    replace = os.replace

    def killing(source, target):
        replace(source, target)
        if str(target).endswith(".checkpoint"):
            raise KilledError

    for folder in ("whole", "cut"):
        (tmp_path / folder).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killing)
        assert "KilledError" in run(tmp_path / "cut", *options).stderr
    assert list((tmp_path / "cut").rglob("*.checkpoint"))
    assert not list((tmp_path / "cut").rglob("*.png")), "killed too late to show anything"
    pictures = {}
    for folder in ("cut", "whole"):
        done = run(tmp_path / folder, *options)
        assert done.returncode == 0, done.stderr[-1500:]
        files = sorted((tmp_path / folder).rglob("images/*/*.png"))
        pictures[folder] = [f.read_bytes() for f in files]
    assert len(pictures["cut"]) == 2
    assert pictures["cut"] == pictures["whole"]


def test_a_diverged_fine_tuning_stops_and_leaves_no_weights(tmp_path):
    with pytest.raises(UserError, match=r"training loss is nan .*finetune\.lr"):
        tuning("plain", lr=1e20, epochs=3)(digits_backbone(), Digits(8), work(tmp_path))
    assert not list((tmp_path / "cache/finetuned").glob("*.safetensors"))


def test_other_backbones_are_refused(tmp_path):
    with pytest.raises(UserError, match="Toy cannot be fine-tuned, only a DiT"):
        tuning()(Toy(8, mean=0.0, shift=0.1, std=0.3), Digits(8), work(tmp_path))


def test_memory_saving_and_half_precision_train_nearly_the_same(tmp_path):
    def weights(**options):
        few = Digits(8, classes=[3, 7])
        (phase,) = tuning(**options)(digits_backbone(), few, work(tmp_path))
        return load_tensors(phase.weights)

    plain, saving = weights(), weights(gradient_checkpointing="true")
    assert all(torch.allclose(saving[k], v, atol=1e-5) for k, v in plain.items())
    name = "transformer_blocks.0.attn1.to_q.bias"
    alike = cosines(weights(precision="bfloat16")[name][None], plain[name][None])
    assert alike.item() > 0.99

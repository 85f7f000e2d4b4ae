"""Fine-tuning: losses by hand, memories by brute force, and trainings that survive anything."""

import os
from dataclasses import asdict

import pytest
import torch
from conftest import run
from PIL import Image
from support import composed

from mgd3.backbones.dit import DiT
from mgd3.backbones.toy import Toy
from mgd3.backbones.weights.dit_weights import build_network
from mgd3.config.build import build
from mgd3.data.datasets import Digits
from mgd3.finetuning.difffit import DiffFit
from mgd3.finetuning.memories import (
    LatentMemory,
    cosines,
    diversity_loss,
    representativeness_loss,
)
from mgd3.finetuning.tuning import FineTuning
from mgd3.runtime.compute import Compute, Work
from mgd3.runtime.errors import UserError
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
    assert representativeness_loss(x0_hat, labels, real).item() == pytest.approx((1 + 2) / 2)
    # class 0: the largest is 1; class 1: -1
    assert diversity_loss(x0_hat, labels, real).item() == pytest.approx((1 - 1) / 2)


def test_a_class_without_a_memory_counts_in_the_mean_alone():
    x0_hat, labels = latents((1, 0), (0, 1)), torch.tensor([0, 1])
    assert representativeness_loss(x0_hat, labels, memory()).item() == 0
    half = representativeness_loss(x0_hat, labels, memory(c1=[(1, 0)])).item()
    assert half == pytest.approx((1 - 0) / 2)


def test_gradients_flow_through_the_estimate_and_not_into_memories():
    x0_hat = latents((1.0, 0.5)).requires_grad_()
    real = memory(c0=[(0, 1)])
    representativeness_loss(x0_hat, torch.tensor([0]), real).backward()
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


def test_a_memory_without_room_is_refused():
    with pytest.raises(UserError, match=r"finetune\.memory_size=0"):
        LatentMemory(0, "fifo")
    with pytest.raises(UserError, match=r"memory_policy='lru' .*fifo, max_redundancy"):
        LatentMemory(1, "lru")


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

    def _loss(self, backbone, x0, labels, step, real, generated):
        if step == 8:
            raise KilledError
        return super()._loss(backbone, x0, labels, step, real, generated)


def test_an_interrupted_fine_tuning_ends_as_an_uninterrupted_one(tmp_path):
    rule = tuning(memory_size=4)
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

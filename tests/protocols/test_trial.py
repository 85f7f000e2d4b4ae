"""A batch tried beforehand: it costs what it says, and no training notices it."""

from dataclasses import replace

import torch
from support import composed

from eval.protocols.trial import GUESS, TrainingCost, few, tried
from mgd3.config.build import build_protocol

CPU = torch.device("cpu")


def test_a_trial_draws_nothing_from_the_global_stream():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    step = tried("convnet2_w8", 16, 2, 4, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert step.seconds > 0 and few(64, CPU) == 8 and few(2, CPU) == 2


def test_what_was_timed_here_is_no_guess(tmp_path):
    protocol = build_protocol(composed("protocol=hard_label_short"))
    cost = TrainingCost(
        student="convnet2_w8", protocol=protocol, recipe=protocol.recipe(1, 2, "convnet2_w8"),
        images=20, num_classes=2, cache=tmp_path, device=CPU,
    )  # fmt: skip
    seconds, guess = cost.seconds(10)
    assert seconds > 0 and guess == GUESS
    cost.pace.add(5, 10.0)  # five epochs took ten seconds
    assert cost.seconds(10) == (20.0, "")
    assert replace(cost, compiled=True).pace.seconds is None  # compiled code has a pace of its own

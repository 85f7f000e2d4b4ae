"""Losses that are looked at now and then: none is lost, and none that diverged is kept."""

import pytest
import torch

from mgd3.finetuning.loss_record import Losses
from mgd3.runtime.errors import UserError


def losses():
    return Losses(lambda step, loss: UserError(f"{loss} at {step}"))


def test_every_loss_is_there_and_the_latest_are_averaged():
    found = losses()
    for k in range(5):
        found.add(torch.tensor(float(k), requires_grad=True))
    assert found.all() == [0, 1, 2, 3, 4] and len(found) == 5
    assert found.recent(2) == 3.5 and losses().recent(2) == 0
    found.restore([7.0])
    found.add(torch.tensor(9.0))
    assert found.all() == [7, 9]


def test_a_loss_that_is_not_finite_is_named_before_it_is_learned_from():
    found = losses()
    found.add(torch.tensor(1.0))
    with pytest.raises(UserError, match="nan at 1"):
        found.add(torch.tensor(float("nan")))

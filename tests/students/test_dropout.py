"""Dropout's masks: PyTorch's own on a CPU, and the same wherever and however a student runs."""

import copy

import pytest
import torch
from timm.layers import DropPath as TimmsDropPath
from torch import nn
from torchvision.ops import StochasticDepth

from eval.students import dropout
from eval.students.dropout import keep_mask, part_of_batch, portable
from eval.students.registry import find_student, make_student

THEIRS = {
    "values": (lambda: nn.Dropout(0.3), (6, 5)),
    "values in place": (lambda: nn.Dropout(0.5, inplace=True), (4, 7, 3)),
    "channels": (lambda: nn.Dropout2d(0.3), (4, 6, 3, 3)),
    "branches": (lambda: TimmsDropPath(0.4), (8, 3, 2)),
    "branches, unscaled": (lambda: TimmsDropPath(0.4, scale_by_keep=False), (8, 3, 2)),
    "rows": (lambda: StochasticDepth(0.4, "row"), (8, 3, 2, 2)),
    "batch": (lambda: StochasticDepth(0.5, "batch"), (8, 3, 2, 2)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", THEIRS)
def test_on_a_cpu_nothing_changes(kind, dtype):
    make, shape = THEIRS[kind]
    net = nn.Sequential(nn.Identity(), make())
    ours, x = portable(copy.deepcopy(net)), torch.randn(shape).to(dtype)
    assert type(ours[1]) is not type(net[1])
    for run in (net, ours):
        run.train()
        torch.manual_seed(4)
        run.found = [run(x.clone()), run(x.clone())], torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(net.found[0], ours.found[0], strict=True))
    assert torch.equal(net.found[1], ours.found[1])
    assert torch.equal(ours.eval()(x), x)


def test_students_drop_by_masks_of_ours():
    for name, size, count in (("alexnet", 64, 2), ("vgg11", 32, 2), ("vit_glad_p8", 16, 31)):
        with torch.device("meta"):  # no memory for a hundred million parameters
            kinds = [type(m) for m in portable(find_student(name, size)(3)).modules()]
        assert kinds.count(dropout.Dropout) == count and nn.Dropout not in kinds
    made = make_student("timm/test_vit", 3, 160, seed=0)
    assert nn.Dropout not in map(type, made.modules())


def test_memory_layout_and_shared_batches_change_no_mask():
    net, x = portable(nn.Sequential(nn.Dropout(0.5))), torch.randn(6, 4, 3, 3)
    torch.manual_seed(0)
    whole = net(x)
    torch.manual_seed(0)
    assert torch.equal(net(x.to(memory_format=torch.channels_last)), whole)
    for mine in (slice(0, 2), slice(2, 6)):
        torch.manual_seed(0)
        with part_of_batch(6, mine):
            assert torch.equal(net(x[mine]), whole[mine])
    windows = x.view(12, 2, 3, 3)  # two rows of an image
    torch.manual_seed(0)
    whole = net(windows)
    torch.manual_seed(0)
    with part_of_batch(6, slice(2, 6)):
        assert torch.equal(net(windows[4:]), whole[4:])


def test_compiled_code_draws_nothing_itself(graphs):
    """Inductor's random numbers are none of PyTorch's: no graph may hold any."""
    net = portable(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Dropout(0.2)))
    found, x = [], torch.randn(5, 4)
    for run in (net, torch.compile(net)):
        torch.manual_seed(1)
        found.append(torch.stack([run(x), run(x)]))
    assert torch.equal(*found) and (found[0] == 0).any()
    assert graphs
    assert not any(word in graph.code for graph in graphs for word in ("dropout", "bernoulli"))


def test_only_masks_too_large_for_a_cpu_are_drawn_by_the_device(monkeypatch):
    elsewhere, before = torch.empty(0, device="meta"), torch.get_rng_state()
    monkeypatch.setattr(dropout, "LARGEST", 10)
    assert keep_mask((2, 6), 0.5, elsewhere).shape == (2, 6)
    assert torch.equal(torch.get_rng_state(), before)
    keep_mask((2, 5), 0.5, elsewhere)
    assert not torch.equal(torch.get_rng_state(), before)
    keep_mask((2, 6), 0.5, torch.empty(0))  # a CPU's own are all drawn there

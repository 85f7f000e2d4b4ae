"""The device itself; test_dry.py runs this in a process of its own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from dry.count import counting
from dry.device import DEVICE, TO_DEVICE, TO_HOST, DeviceMixError


def test_operands_of_two_devices_are_refused_but_for_single_values():
    ours, theirs = torch.ones(3, device=DEVICE), torch.ones(3)
    for mixed in (
        lambda: ours + theirs,
        lambda: torch.cat([ours, theirs]),
        lambda: torch.stack([ours[0], theirs[0]]),
        lambda: theirs[torch.tensor([0], device=DEVICE)],
        lambda: nn.functional.linear(ours, theirs[None]),
    ):
        with pytest.raises(DeviceMixError):
            mixed()
    assert (ours + torch.tensor(2)).tolist() == [3, 3, 3]
    assert torch.where(ours > 0, torch.tensor(5.0), ours).tolist() == [5, 5, 5]


def test_numpy_and_host_generators_are_refused():
    ours = torch.ones(3, device=DEVICE)
    for read in (ours.numpy, lambda: np.asarray(ours), ours.detach().numpy):
        with pytest.raises(TypeError, match="can't convert dry:0 device type tensor to numpy"):
            read()
    with pytest.raises(DeviceMixError):
        torch.randn(3, device=DEVICE, generator=torch.Generator())


def test_draws_come_from_the_devices_own_stream():
    torch.manual_seed(0)
    host = torch.rand(2)
    torch.manual_seed(0)
    drawn = torch.rand(2, device=DEVICE)
    dropped = nn.functional.dropout(torch.ones(64, device=DEVICE))
    assert torch.equal(torch.rand(2), host)  # untouched by both
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2, device=DEVICE), drawn)
    assert torch.equal(nn.functional.dropout(torch.ones(64, device=DEVICE)), dropped)


def test_waits_and_copies_are_counted():
    ours, mask = torch.arange(4.0, device=DEVICE), torch.tensor([True, False, True, True])
    there = mask.to(DEVICE)

    def waits(work):
        with counting() as found:
            work()
        return sum(found.waits.values())

    once = (
        ours.sum().item, ours.tolist, ours.unique, ours.nonzero, ours.cpu,
        lambda: ours[there], lambda: ours[mask], lambda: torch.equal(ours, ours),
        lambda: bool(ours[0] > 0), lambda: ours.masked_select(there),
        lambda: torch.tensor([1.0], device=DEVICE), lambda: f"{ours[0]:.2f}",
    )  # fmt: skip
    assert [waits(work) for work in once] == [1] * 6 + [2] + [1] * 5  # a host mask is copied too
    none = (
        lambda: ours * 2, lambda: ours.masked_fill(there, 0),
        lambda: mask.to(DEVICE, non_blocking=True),
        lambda: torch.zeros(3, device=DEVICE), lambda: ours.clone().index_put_((there,), ours[0]),
        lambda: torch.arange(7, device=DEVICE), lambda: ours[1:].view(3, 1),
    )  # fmt: skip
    assert [waits(work) for work in none] == [0] * len(none)


def test_bytes_are_those_that_cuda_moves():
    """Types are converted where the source is, on the way up; where it was, on the way down."""
    pixels = torch.zeros(2, 3, dtype=torch.uint8)
    with counting() as found:
        there = pixels.to(DEVICE, torch.float32)
        there.to("cpu", torch.float64)
        torch.zeros(4, 3, device=DEVICE).copy_(torch.zeros(3))
        torch.zeros(1, 3).expand(5, 3).to(DEVICE)
    assert sum(found.bytes_by_line(TO_DEVICE).values()) == 24 + 48 + 60
    assert sum(found.bytes_by_line(TO_HOST).values()) == 24
    assert sum(found.expanded.values()) == 48 + 60


def test_inference_mode_makes_what_it_makes_elsewhere():
    for device in ("cpu", DEVICE):
        ordinary = torch.ones(4, device=device)
        with torch.inference_mode():
            view, made = ordinary.view(2, 2), ordinary + 1
            ordinary.add_(1)
        assert (view.is_inference(), made.is_inference()) == (False, True)
        weight = torch.ones(2, 2, device=device, requires_grad=True)
        (weight * view).sum().backward()
        assert weight.grad.cpu().tolist() == [[2, 2], [2, 2]]
        with pytest.raises(RuntimeError, match="inference tensor"):
            made.add_(1)


def test_views_and_operations_in_place_share_memory():
    whole = torch.zeros(2, 3, device=DEVICE)
    whole[0].add_(1)
    whole[:, 1:] = 5
    whole.t()[0, 1] = 7
    assert whole.cpu().tolist() == [[1, 5, 5], [7, 5, 5]]
    assert whole.squeeze_() is whole and whole.unsqueeze_(0).shape == (1, 2, 3)
    one, other = nn.Parameter(torch.ones(2, device=DEVICE)), torch.zeros(2, device=DEVICE)
    one.data, other = other, one.data
    assert (one.tolist(), other.tolist()) == ([0, 0], [1, 1])


@pytest.mark.parametrize("kind", ["sgd", "adamw", "fused", "foreach"])
def test_optimisers_step_as_on_the_cpu(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(144, 5),
    )  # fmt: skip
    images, labels, trained = torch.randn(6, 3, 8, 8), torch.arange(6) % 5, []
    for device in ("cpu", DEVICE):
        own = copy.deepcopy(net).to(device)
        optimizer = (
            torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
            if kind == "sgd"
            else torch.optim.AdamW(
                own.parameters(), lr=0.01, fused=kind == "fused", foreach=kind == "foreach"
            )
        )
        for _ in range(3):
            loss = nn.functional.cross_entropy(own(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.append({name: value.cpu() for name, value in own.state_dict().items()})
        again = copy.deepcopy(net).to(device)
        again.load_state_dict(trained[-1])
        assert all(torch.equal(v, again.state_dict()[k].cpu()) for k, v in trained[-1].items())
    assert all(torch.equal(trained[0][k], trained[1][k]) for k in trained[0])


def test_autocast_takes_half_precision_where_cuda_does():
    ours = torch.randn(4, 4, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        product = ours @ ours
        assert (product.dtype, product.softmax(1).dtype) == (torch.bfloat16, torch.float32)
        assert nn.functional.layer_norm(product, (4,)).dtype == torch.float32
    assert (ours @ ours).dtype == torch.float32

"""Many tensors in one copy: what arrives, and that a training's draws are one."""

from typing import NamedTuple

import torch

from mgd3.runtime.compute import to_device

META = torch.device("meta")  # a device without memory: shapes and types arrive


class Pair(NamedTuple):
    one: torch.Tensor
    other: torch.Tensor | None


def test_a_tree_arrives_as_it_was():
    there = torch.zeros(2, device=META)
    tree = (
        Pair(torch.arange(3).bool(), None),
        {"a": torch.zeros(2, 5, dtype=torch.float16), 7: torch.zeros(0, 3)},
        [torch.ones((), dtype=torch.int64), "word", 0.5, there],
        torch.zeros(3, 3).T[:2].expand(4, 2, 3),
    )
    arrived = to_device(tree, META)
    assert isinstance(arrived[0], Pair) and arrived[0].other is None
    assert arrived[2][1:3] == ["word", 0.5] and arrived[2][3] is there
    pairs = [
        (tree[0].one, arrived[0].one), (tree[1]["a"], arrived[1]["a"]),
        (tree[1][7], arrived[1][7]), (tree[2][0], arrived[2][0]), (tree[3], arrived[3]),
    ]  # fmt: skip
    for sent, came in pairs:
        assert (came.shape, came.dtype, came.device) == (sent.shape, sent.dtype, META)
    assert len({came.untyped_storage()._cdata for _, came in pairs}) == 1  # of one buffer
    assert to_device(tree, torch.device("cpu")) is tree

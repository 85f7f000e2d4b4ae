"""What CUDA does with operations: which wait for the device, which take single host values."""

from __future__ import annotations

import torch

aten = torch.ops.aten

# The host reads what these compute, or needs a size that only the device knows, or looks whether
# they have failed (the decompositions).
_WAITS = frozenset(
    {
        aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default,
        aten.masked_select.default, aten._unique2.default, aten.unique_dim.default,
        aten.unique_consecutive.default, aten.bincount.default, aten.multinomial.default,
        aten._linalg_svd.default, aten._linalg_eigh.default, aten.linalg_cholesky_ex.default,
    }
)  # fmt: skip
INDEXED = frozenset(
    {
        aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default,
        aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index_put.default,
    }
)  # fmt: skip
# Beside pointwise operations these too take single values from the host.
_TAKES_HOST_VALUES = INDEXED | {
    aten.fill_.Tensor, aten.fill.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor,
    aten.where.self, aten.lerp.Tensor, aten.lerp_.Tensor, aten.clamp.Tensor,
    aten._foreach_mul.Tensor, aten._foreach_mul_.Tensor,
}  # fmt: skip


def takes_host_values(op) -> bool:
    """May an operand be a host tensor of no dimensions? CUDA passes it along as a number."""
    return op in _TAKES_HOST_VALUES or torch.Tag.pointwise in op.tags


def waits_for(op, args, kwargs) -> str | None:
    """What makes the host wait for the device, None if nothing does."""
    if op in _WAITS:
        return op._opname
    if op is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if op in INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        is_masked_fill = len(args) > 2 and len(masks) == 1 and args[2].numel() == 1
        if masks and not is_masked_fill:
            return "index by a mask"
    return None

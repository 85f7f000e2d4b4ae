"""CUDA's autocast for the dry device: which operations run in half precision, which in float32.

The lists are those of PyTorch's autocast_mode.h for CUDA, as far as networks here use them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_LOWER = (
    "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "conv_transpose2d.input",
    "convolution", "_convolution", "linear", "matmul", "mm", "prelu",
    "scaled_dot_product_attention",
)  # fmt: skip
_FLOAT32 = (
    "cdist", "cosine_similarity", "cross_entropy_loss", "exp", "group_norm", "kl_div",
    "layer_norm", "log", "log_softmax.int", "mse_loss", "nll_loss", "pow.Tensor_Scalar", "rsqrt",
    "softmax.int", "sum", "sum.dim_IntList",
)  # fmt: skip
_FLOATING = (torch.float16, torch.bfloat16, torch.float32)  # what autocast touches


def register(name: str) -> list[torch.library.Library]:
    """Autocast of the device `name`; it lasts as long as what is returned."""
    everything = torch.library.Library("_", "IMPL")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    rules = torch.library.Library("aten", "IMPL")
    for operations, lower in ((_LOWER, True), (_FLOAT32, False)):
        for operation in operations:
            rules.impl(operation, _casting(operation, lower, name), "AutocastPrivateUse1")
    return [everything, rules]


def _casting(operation: str, lower: bool, device: str):
    packet, _, overload = operation.partition(".")
    op = getattr(getattr(torch.ops.aten, packet), overload or "default")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        dtype = torch.get_autocast_dtype(device) if lower else torch.float32

        def cast(x):
            ours = isinstance(x, Tensor) and x.device.type == device and x.dtype in _FLOATING
            return x.to(dtype) if ours else x

        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel

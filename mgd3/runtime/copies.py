"""Copies between the host and a GPU that make neither wait for the other."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on the device.

    On a GPU the copy joins the queue. From ordinary memory it would wait until the queue is empty.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class HostCopy:
    """A tensor of a device on its way to the host, while the device goes on with other work."""

    def __init__(self, tensor: Tensor) -> None:
        on_gpu = tensor.device.type == "cuda"
        self._tensor = tensor.to("cpu", non_blocking=on_gpu)  # into pinned memory, if so
        self._arrived = torch.cuda.Event() if on_gpu else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        """The tensor on the CPU, once it is there; from any thread."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor

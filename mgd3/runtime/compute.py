"""How networks run: device, precision, compilation, memory layout, and what is copied there."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from mgd3.runtime import checks
from mgd3.runtime.batching import memory_words, ran_out_of_memory
from mgd3.runtime.errors import UserError
from mgd3.runtime.hardware import unavailable, why_no_gpu

log = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)
T = TypeVar("T")
_AS_WRITTEN: ContextVar[bool] = ContextVar("as_written", default=False)
_AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_ALIGNED = 8  # bytes: the items of every dtype may begin at a multiple of it
_TRAINING = ("float32", "tf32", "bfloat16")


def pick_device(device: str | int | torch.device) -> torch.device:
    """`auto` is the GPU if there is one; a GPU named as cuda:N also becomes PyTorch's current one.

    Raises `UserError` for what is not there, and for one GPU for all processes of torchrun.
    """
    device = f"cuda:{device}" if isinstance(device, int) else str(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    named = device.startswith("cuda:")
    if named and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"compute.device={device}: torchrun gives every process a GPU of its own; use "
            "compute.device=cuda, and CUDA_VISIBLE_DEVICES to choose among them"
        )
    try:
        found = torch.zeros(1, device=device).device
        if named:  # or random numbers, memory and messages would be another GPU's
            torch.cuda.set_device(found)
        return found
    except (RuntimeError, AssertionError) as error:
        if ran_out_of_memory(error):
            raise UserError(
                f"compute.device={device} has no memory left{memory_words()}"
            ) from error
        raise unavailable(device, _reason(device)) from error


def _reason(device: str) -> str:
    """Why a device cannot be had."""
    if device.split(":")[0] != "cuda":
        return "this build of PyTorch has no such device"
    if count := torch.cuda.device_count():
        return (
            f"there are {count} GPUs, from cuda:0 on" if count > 1 else "there is one GPU, cuda:0"
        )
    return why_no_gpu() or "the driver finds no GPU, or one that this build of PyTorch is not for"


@dataclass(frozen=True)
class Compiled:
    """What torch.compile takes, as `compute.compile` says: a minute at first, faster then."""

    denoiser: bool  # False: as written, which guidances that need its gradients ask for
    training: bool  # of students, of networks on the real set, and of a backbone

    @classmethod
    def of(cls, value: object) -> Compiled:
        """By true, false or «training»; `UserError` for another value and without a compiler."""
        if value != "training" and not isinstance(value, bool):
            raise UserError(f"compute.compile={value!r} must be true, false or training")
        if value:
            _require_compiler()
        return cls(denoiser=value is True, training=bool(value))


def _require_compiler() -> None:
    compilers = os.environ.get("CXX"), "c++", "g++", "clang++", "cl"
    if not any(shutil.which(c) for c in compilers if c):
        raise UserError(
            "compute.compile needs a C++ compiler (g++ or clang++) on the PATH, or named by CXX; "
            "install one, or leave compute.compile=false"
        )


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Options of a backbone's networks; weights and latents are float32 in any case.

    All runs share the latents of real images: those of each encoding precision are kept apart.
    """

    only_how: ClassVar[bool] = True  # as a setting of another part it does not count

    device: str = "auto"
    precision: str = "float32"  # or tf32 (GPU only), bfloat16, float16: the last two by autocast
    encoding_precision: str = "float32"  # of real images: or tf32 (GPU only), bfloat16
    compile: bool = False  # torch.compile: a minute at first, faster afterwards
    channels_last: bool = False  # memory layout of convolutions
    vae_slicing: bool = False  # encode and decode one image at a time
    torch_device: torch.device = field(init=False)

    def __post_init__(self) -> None:
        checks.choice("compute.precision", self.precision, ["float32", "tf32", *_AUTOCAST])
        known = ["float32", "tf32", "bfloat16"]  # VAEs overflow in float16
        checks.choice("compute.encoding_precision", self.encoding_precision, known)
        for key in ("compile", "channels_last", "vae_slicing"):
            checks.flag(f"compute.{key}", getattr(self, key))
        if self.compile:
            _require_compiler()
        object.__setattr__(self, "torch_device", pick_device(self.device))
        for key in ("precision", "encoding_precision"):
            if getattr(self, key) == "tf32" and self.torch_device.type == "cpu":
                log.warning("compute.%s=tf32 is float32 on a CPU", key)

    @torch.inference_mode(False)  # weights that gradients may flow through, wherever they load
    def place(self, network: Network) -> Network:
        """`network` on the device, frozen, in the chosen layout."""
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)
        return network.to(self.torch_device).eval().requires_grad_(False)

    @property
    def autocast_type(self) -> torch.dtype | None:
        """What autocast casts to in the chosen precision; None where it casts nothing."""
        return _AUTOCAST.get(self.precision)

    def compiled(self, network: Network) -> Network:
        """`network` compiled, if that was asked for; it shares the weights."""
        return cast(Network, torch.compile(network)) if self.compile else network

    def layout(self, images: Tensor) -> Tensor:
        """Images or latents (B, C, H, W) on the device, in the chosen layout."""
        images = images.to(self.torch_device)
        return images.to(memory_format=torch.channels_last) if self.channels_last else images

    def running(self) -> AbstractContextManager[None]:
        """The chosen precision, inside the block only."""
        return self._computing(self.precision)

    def encoding(self) -> AbstractContextManager[None]:
        """The precision of encoding, inside the block only."""
        return self._computing(self.encoding_precision)

    @contextmanager
    def _computing(self, precision: str) -> Iterator[None]:
        with matmul_precision("high" if precision == "tf32" else "highest"):
            if precision not in _AUTOCAST:
                yield
                return
            with torch.autocast(self.torch_device.type, dtype=_AUTOCAST[precision]):
                yield


@dataclass(frozen=True, kw_only=True)
class Work:
    """How work is done; nothing here changes a result but `flip`."""

    only_how: ClassVar[bool] = True  # as a setting of another part it does not count

    cache: Path  # latents and inventories, shared by all runs
    batch_size: int | str  # images sampled at once, or «auto»
    workers: int  # threads that decode files
    flip: str  # «none», or «random» as in the released loader

    def __post_init__(self) -> None:
        if self.batch_size != "auto":
            checks.integer("compute.batch_size (or auto)", self.batch_size, minimum=1)
        checks.integer("compute.workers", self.workers, minimum=1)
        checks.choice("flip", self.flip, ["none", "random"])


def check_training_precision(value: object) -> str:
    """What networks are trained and asked in: float32, on TF32 units, or by autocast bfloat16."""
    return checks.choice("compute.training_precision", value, _TRAINING)


@contextmanager
def training_in(precision: str) -> Iterator[None]:
    """A training, a test or a question in a training precision, inside the block only.

    float32 is float32 in it: PyTorch's convolutions take TF32 units otherwise. Forward passes of
    bfloat16 go in `autocast` besides; backward ones do not.
    """
    with matmul_precision("high" if precision == "tf32" else "highest"):
        yield


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """A forward pass in a training precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def as_written() -> Iterator[None]:
    """Inside this block nothing is compiled: a probe of the memory is not worth the minutes."""
    token = _AS_WRITTEN.set(True)
    try:
        yield
    finally:
        _AS_WRITTEN.reset(token)


def runs_as_written() -> bool:
    """Is this such a block?"""
    return _AS_WRITTEN.get()


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """float32 products as they are («highest») or on TF32 units («high»), inside the block only."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = precision == "high"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def to_device(tree: T, device: torch.device) -> T:
    """Tensors of the CPU, alone or in (named) tuples, lists and mappings, on `device`.

    All of them together are one copy. To a GPU it goes from pinned memory, so that the CPU goes on
    at once. Whatever else the tree holds stays as it is, and so do tensors on a device.
    """
    if device.type == "cpu":
        return tree
    leaves, shape = tree_flatten(tree)
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.device.type == "cpu"]
    ends, size = [], 0
    for i in places:
        size += -size % _ALIGNED + leaves[i].nbytes
        ends.append(size)
    packed = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
    for i, end in zip(places, ends, strict=True):
        _part(packed, leaves[i], end).copy_(leaves[i])
    there = packed.to(device, non_blocking=True)
    for i, end in zip(places, ends, strict=True):
        leaves[i] = _part(there, leaves[i], end)
    return tree_unflatten(leaves, shape)


def _part(packed: Tensor, like: Tensor, end: int) -> Tensor:
    """The bytes before `end` as a tensor of the shape and dtype of `like`."""
    return packed[end - like.nbytes : end].view(like.dtype).view(like.shape)


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

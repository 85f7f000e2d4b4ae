"""A device that computes on the CPU and keeps a GPU's rules.

A tensor on it holds a host tensor, on which every operation is computed, so values are the CPU's.
What CUDA refuses is refused: operands on two devices (but for single host values where CUDA takes
them), host generators for draws of the device, numpy. What CUDA waits for or copies is counted.

It is one of PyTorch's backends for other people's devices («PrivateUse1»), implemented in Python:
factories come to the backend's fallback, all else to `DryTensor.__torch_dispatch__`. A process can
have one such backend, keeps it, and must have it before its first backward pass: import this module
first thing in a process of its own.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.optim.optimizer import _foreach_supported_types
from torch.utils import backend_registration

from dry import autocast, rules
from dry.count import counts

NAME = "dry"
TO_DEVICE, TO_HOST = "to device", "to host"
aten = torch.ops.aten


class DeviceMixError(RuntimeError):
    """Tensors or generators of two devices where CUDA wants one."""


class DryTensor(Tensor):
    """A tensor on the device; `host` has its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> DryTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(NAME, 0),
        )
        made.host = host
        return made

    @property
    def data(self) -> Tensor:
        """The same values without a history."""
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # refuses another device
        self.host = value.host

    def numpy(self, *args: object, **kwargs: object) -> None:
        raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy; use .cpu() first")

    def __array__(self, *args: object, **kwargs: object) -> None:
        self.numpy()

    def tolist(self) -> object:
        counts().waited("tolist")
        return self.host.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else format(repr(self), spec)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"{NAME}({self.host!r})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, args, kwargs or {})


class _Backend(backend_registration._DummyBackendModule):
    """What `torch.dry` answers; its random numbers come from a stream of its own."""

    def __init__(self) -> None:
        self.random = torch.Generator("cpu").manual_seed(0)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def manual_seed_all(self, seed: int) -> None:
        self.random.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: object = 0) -> Tensor:
        return self.random.get_state()

    def set_rng_state(self, state: Tensor, device: object = 0) -> None:
        self.random.set_state(state)

    def synchronize(self, device: object = 0) -> None:
        counts().waited("synchronize")

    @contextmanager
    def drawing(self):
        """Operations that draw from the host's global stream draw from the device's instead."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.random.get_state())
        try:
            yield
        finally:
            self.random.set_state(torch.get_rng_state())
            torch.set_rng_state(before)


@dataclass(frozen=True)
class _Facts:
    """What an operation is, from its schema and tags."""

    composite: bool  # defined by other operations, on every device
    draws: bool
    mutable: bool
    view: bool
    factory: bool  # has a device, and no tensor to take it from


@cache
def _facts(op) -> _Facts:
    schema = op._schema
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return _Facts(
        composite=has(op.name(), "CompositeImplicitAutograd") and not has(op.name(), "CPU"),
        draws=torch.Tag.nondeterministic_seeded in op.tags,
        mutable=schema.is_mutable,
        view=not schema.is_mutable and any(r.alias_info is not None for r in schema.returns),
        factory=any(a.name == "device" for a in schema.arguments)
        and not any("Tensor" in str(a.type) for a in schema.arguments),
    )


def _run(op, args, kwargs):
    """One operation of which a tensor is on the device, or whose result is to be."""
    if op is aten._to_copy.default:
        return _converted(*args, **kwargs)
    if op is aten.copy_.default:
        return _copied(*args, **kwargs)
    facts = _facts(op)
    if facts.composite:
        made = op.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
    tensors: list[Tensor] = []
    host_args = _host(args, tensors)
    host_kwargs = {name: _host(value, tensors) for name, value in kwargs.items()}
    _refuse_mixtures(op, args, tensors)
    _refuse_host_generators(op, kwargs)
    if (waits_for := rules.waits_for(op, args, kwargs)) is not None:
        counts().waited(waits_for)
    host_kwargs.pop("pin_memory", None)
    device = torch.device(host_kwargs.get("device") or NAME)
    if "device" in host_kwargs or facts.factory:
        host_kwargs["device"] = torch.device("cpu")
    with torch._C._AutoDispatchBelowAutograd():
        if facts.draws:
            with BACKEND.drawing():
                out = op(*host_args, **host_kwargs)
        else:
            out = op(*host_args, **host_kwargs)
    return _wrapped(facts, out, tensors) if device.type == NAME else out


def _host(x, seen: list[Tensor]):
    """An argument as the host computes with it; its tensors are added to those `seen`."""
    if isinstance(x, Tensor):
        seen.append(x)
        return x.host if isinstance(x, DryTensor) else x
    if isinstance(x, list | tuple):
        return type(x)(_host(item, seen) for item in x)
    return x


def _wrapped(facts: _Facts, out, tensors: list[Tensor]):
    """Results on the device; an operand that the operation changed is returned as itself."""
    ours = [x for x in tensors if isinstance(x, DryTensor)]
    changed = {id(x.host): x for x in ours} if facts.mutable else {}
    for x in changed.values():
        if x.shape != x.host.shape or x.stride() != x.host.stride():  # resized, squeezed, ...
            Tensor.data.__set__(x, DryTensor(x.host))
    # in inference mode too, a view of an ordinary tensor is an ordinary tensor
    ordinary = facts.view and bool(ours) and not ours[0].is_inference()
    if ordinary and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):
            return _device(out, changed)
    return _device(out, changed)


def _device(x, changed: dict[int, DryTensor]):
    if isinstance(x, Tensor):
        return changed[id(x)] if id(x) in changed else DryTensor(x)
    if isinstance(x, list | tuple):
        return type(x)(_device(item, changed) for item in x)
    return x


def _refuse_mixtures(op, args, tensors: list[Tensor]) -> None:
    hosts = [x for x in tensors if not isinstance(x, DryTensor)]
    if not hosts or len(hosts) == len(tensors):
        return
    if op in rules.INDEXED:
        if not isinstance(args[0], DryTensor):
            raise DeviceMixError(f"{op}: indices on the device, the indexed tensor on the host")
        indices = [i for i in args[1] if isinstance(i, Tensor) and not isinstance(i, DryTensor)]
        for index in indices:
            counts().copied(TO_DEVICE, index.nbytes, blocking=True)
        hosts = [x for x in hosts if not any(x is i for i in indices)]
    wrong = [x for x in hosts if x.dim() or not rules.takes_host_values(op)]
    if wrong:
        shapes = ", ".join(str(tuple(x.shape)) for x in wrong)
        raise DeviceMixError(f"{op}: tensors of the host (shapes {shapes}) beside the device's")


def _refuse_host_generators(op, kwargs) -> None:
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type == "cpu":
        raise DeviceMixError(f"{op}: a generator of the host for draws of the device")


def _copied(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """`to.copy_(source)`; bytes as CUDA moves them: converted before they leave the host."""
    here, there = isinstance(source, DryTensor), isinstance(to, DryTensor)
    if there and not here:
        written_out = source.numel() < to.numel() or _is_expanded(source)
        counts().copied(TO_DEVICE, to.nbytes, not non_blocking, written_out)
    elif here and not there:
        counts().copied(TO_HOST, source.nbytes, not non_blocking)
    with torch._C._AutoDispatchBelowAutograd():
        (to.host if there else to).copy_(source.host if here else source)
    return to


def _converted(source, *, device=None, non_blocking=False, pin_memory=None, **options):
    """`Tensor.to` without a history: another device, type or layout."""
    here = isinstance(source, DryTensor)
    there = here if device is None else torch.device(device).type == NAME
    with torch._C._AutoDispatchBelowAutograd():
        made = aten._to_copy.default(source.host if here else source, **options)
    if not there:
        counts().copied(TO_HOST, source.nbytes, not non_blocking)
        return made
    if not here:
        counts().copied(TO_DEVICE, made.nbytes, not non_blocking, _is_expanded(source))
    return DryTensor(made)


def _is_expanded(x: Tensor) -> bool:
    """Does it show the same memory more than once?"""
    return any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))


def _register() -> list[object]:
    """Make it this process's device; what is returned must live as long as the process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=BACKEND)
    _foreach_supported_types.append(DryTensor)  # optimisers take CUDA's tensors all at once
    factories = torch.library.Library("_", "IMPL")
    factories.fallback(lambda op, *args, **kwargs: _run(op, args, kwargs), "PrivateUse1")
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("copy_", _copied, "PrivateUse1")  # for `torch.tensor(values, device=...)`
    # autograd would spell these out for a device of its own; the CPU and CUDA have kernels
    for name in ("silu_backward", "mish_backward", "native_channel_shuffle"):
        kernels.impl(name, torch.library.fallthrough_kernel, "AutogradPrivateUse1")
    return [factories, kernels, *autocast.register(NAME)]


BACKEND = _Backend()
_registered = _register()
DEVICE = torch.device(NAME, 0)

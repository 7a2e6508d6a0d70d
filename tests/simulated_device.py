"""An accelerator that needs no hardware: a device in Python, for tests of what only goes wrong on a GPU.

A tensor "on" it is a wrapper around one on the CPU, which holds the numbers; autograd, autocast and modules take it for
what it says it is. Three things are as on CUDA:

- Mixing with tensors on the CPU is an error, but for numbers (0-dim) in elementwise operations and indices in `x[i]`.
- What makes the host wait until the device has caught up is noted, with the place in this project that asked for it:
  copies, unless pinned and `non_blocking`; `.item()`, `bool`, `.tolist()`, `nonzero`, a mask or a list as index.
- A copy that nobody waits for has not happened yet: the host reads NaN until the next wait, and must leave what it
  sends as it is.

Registering a device changes PyTorch for good, so that happens in a process of its own: `tests/simulated.py`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

NAME = "simulated"  # PyTorch knows it by this name once `register` in tests/simulated.py has run
PROJECT, aten = f"{Path(__file__).parent.parent}/", torch.ops.aten

TRANSFERS = {aten._to_copy, aten.copy_}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# On CUDA the size of what these return, or their own checks, are read by the host.
READ_BY_HOST = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount, aten.multinomial),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive),
}
# Not elementwise, and a number from the CPU is welcome all the same: (operation, place of the argument)
NUMBERS = {(aten.fill_, 1), (aten.fill, 1), (aten.masked_fill, 2), (aten.masked_fill_, 2), (aten.index_put_, 2)}


class Wait(NamedTuple):
    """What the host waited for, and where in the project."""

    what: str
    file: str
    function: str
    line: int


class Simulated(TorchDispatchMode):
    """The device, while it is entered. `waits`: all of them so far, the first first."""

    def __init__(self) -> None:
        super().__init__()
        self.random_state = torch.get_rng_state()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The device exists within the block, as new."""
        self.waits: list[Wait] = []
        self.pinned: Any = WeakTensorKeyDictionary()
        self.arriving: list[tuple[Tensor, Tensor]] = []  # copies to the host, and what they will bring
        self.leaving: list[tuple[Tensor, int]] = []  # what is being copied from the host, and its version
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(..., device=...)` copies where we see it
        try:
            with self:
                yield
        finally:
            torch._C._set_only_lift_cpu_tensors(False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    @contextmanager
    def watched(self) -> Iterator[list[Wait]]:
        """The waits of the block, filled in at its end."""
        found: list[Wait] = []
        before = len(self.waits)
        yield found
        found += self.waits[before:]

    # --- one operation

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Compute it on the CPU; refuse what CUDA would refuse, note what it would wait for."""
        if torch.is_inference_mode_enabled() and func._can_decompose():  # else autograd has taken it apart
            with self:
                return func.decompose(*args, **kwargs)
        name, asked = func.overloadpacket, kwargs.get("device")
        tensors: list[Tensor] = []
        each(tensors.append, (*args, *kwargs.values()))
        here = any(isinstance(tensor, OnDevice) for tensor in tensors)
        if name in (aten.is_pinned, aten._pin_memory):
            return args[0] in self.pinned if name is aten.is_pinned else self.pin(args[0].clone())
        if name is aten._fused_sdp_choice:
            return 0  # the plain one: products and a softmax
        if name in TRANSFERS:
            return self.copied(func, args, kwargs)
        there = here if asked is None else torch.device(asked).type == NAME
        if here:
            self.check(func, args, kwargs, tensors)
        generator = kwargs.get("generator")
        if there and generator is not None:
            raise RuntimeError(f"Expected a {NAME!r} device type for generator but found {generator.device.type!r}")
        kwargs = {**kwargs, **({"device": "cpu"} if asked is not None else {})}
        pinned = bool(kwargs.pop("pin_memory", None))
        named = {name: each(held, value) for name, value in kwargs.items()}
        found = self.computed(func, each(held, args), named, there)
        written = _written(func, args, kwargs)
        if written is not None:
            return written
        return self.pin(found) if pinned else each(OnDevice, found) if there else found

    def computed(self, func: Any, args: Any, kwargs: Any, there: bool) -> Any:
        """The result on the CPU. The device draws by a generator of its own."""
        if not (there and torch.Tag.nondeterministic_seeded in func.tags):
            return func(*args, **kwargs)
        cpu = torch.get_rng_state()
        torch.set_rng_state(self.random_state)
        try:
            return func(*args, **kwargs)
        finally:
            self.random_state = torch.get_rng_state()
            torch.set_rng_state(cpu)

    def check(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """
        Raises:
            RuntimeError: tensors of both devices, which CUDA would refuse, too.
        """
        name = func.overloadpacket
        if name in READ_BY_HOST or (name is aten.repeat_interleave and kwargs.get("output_size") is None):
            self.wait(name.__name__)
        indices = [index for index in args[1] if index is not None] if name in INDEXED else []
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            self.wait("mask as index")
        if indices and not isinstance(args[0], OnDevice):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        if any(not isinstance(index, OnDevice) for index in indices):
            self.wait("index from the host")
        for tensor in tensors:
            if isinstance(tensor, OnDevice) or any(tensor is index for index in indices):
                continue
            number = torch.Tag.pointwise in func.tags or any(
                at < len(args) and args[at] is tensor for known, at in NUMBERS if known is name
            )
            if tensor.dim() or not number:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and cpu! "
                    f"({func}, shapes {[tuple(t.shape) for t in tensors]})"
                )

    # --- between host and device

    def copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """`x.to(...)` or `x.copy_(y)`, within a device or to the other one."""
        to = func.overloadpacket is aten._to_copy
        source = args[0] if to else args[1]
        if to and kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == NAME
        else:
            there = isinstance(args[0], OnDevice)
        unasked = bool(kwargs.get("non_blocking") or (not to and len(args) > 2 and args[2]))
        if to:
            value = func(held(source), **{**kwargs, **({"device": "cpu"} if "device" in kwargs else {})})
            value = value.clone() if value is held(source) else value
            target, result = value, OnDevice(value) if there else value
        else:
            value, target, result = held(source).clone(), held(args[0]), args[0]
        if there == isinstance(source, OnDevice):
            pass
        elif there:
            self.send(source, unasked)
        elif unasked and (to or target in self.pinned):
            # Behind whatever has left from the same memory: copies follow one another.
            self.leaving = [(sent, version) for sent, version in self.leaving if sent.data_ptr() != target.data_ptr()]
            self.arriving.append((target, value.clone()))
            value = value.new_full(value.shape, torch.nan if value.is_floating_point() else -1)
            self.pin(target)
        else:
            self.wait("copy to the host")
        if not to or value is not target:
            target.copy_(value)
        return result

    def send(self, source: Tensor, unasked: bool) -> None:
        """Copies follow one another: those to the host have come before this one goes."""
        if unasked and source in self.pinned:
            self.settle(False)
            self.leaving += [] if source.is_inference() else [(source, source._version)]
        elif not source.numel():
            return
        else:
            self.wait("copy to the device" if source.dim() else "copy of a number to the device")

    def pin(self, tensor: Tensor) -> Tensor:
        self.pinned[tensor] = True
        return tensor

    def wait(self, what: str) -> None:
        """The host waits, until the device has done all that it was asked for."""
        self.settle(True)
        frame: Any = sys._getframe(1)
        while frame:
            path = frame.f_code.co_filename
            if path.startswith(PROJECT) and "/tests/simulated" not in path and "site-packages" not in path:
                place = path.removeprefix(PROJECT)
                self.waits.append(Wait(what, place, frame.f_code.co_name, frame.f_lineno))
                return
            frame = frame.f_back
        self.waits.append(Wait(what, "", "", 0))

    def settle(self, all_of_them: bool) -> None:
        """Copies to the host arrive; all of them: those from the host have left.

        Raises:
            RuntimeError: something was written to while it was being copied.
        """
        for target, value in self.arriving:
            target.copy_(value)
        self.arriving.clear()
        if all_of_them:
            for source, version in self.leaving:
                if source._version != version:
                    raise RuntimeError("pinned memory was written to before its copy to the device had ended")
            self.leaving.clear()


class OnDevice(torch.Tensor):
    """A tensor on the device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        if held.is_inference() != torch.is_inference_mode_enabled():  # a view is what it is a view of
            with torch.inference_mode(held.is_inference()):
                return OnDevice(held)
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device(NAME, 0), **layout)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return DEVICE.run(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied: Any = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        return memo[id(self)]

    def tolist(self) -> Any:
        return self.cpu().tolist()

    # For those who ask which tensors share memory.
    untyped_storage = property(lambda self: self.held.untyped_storage)
    data_ptr = property(lambda self: self.held.data_ptr)

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"{self.held}, on {NAME}"


DEVICE = Simulated()


def held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnDevice) else tensor


def each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with all of its tensors changed."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)([each(change, item) for item in value])
    return value


@functools.cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """The arguments that an operation writes to and returns, in the order in which it does."""
    given = [(a.alias_info, (at, a.name)) for at, a in enumerate(func._schema.arguments)]
    arguments = {str(alias.before_set): place for alias, place in given if alias}
    returned = [result.alias_info for result in func._schema.returns]
    return tuple(arguments[str(alias.before_set)] for alias in returned if alias and alias.is_write)


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """The arguments that it has written to, where those are its result; else None."""
    found = [kwargs[name] if name in kwargs else args[at] for at, name in _writes(func)]
    return None if not found else found[0] if len(found) == 1 else tuple(found)

"""AdamW's two moments kept elsewhere between steps: eight bytes a weight that only the update itself looks at.

On CUDA `cpu` keeps them in main memory; a folder keeps them on disk, as memory-mapped files that the system may hold in
memory or not, as it has room. At a step each parameter's moments come, are used and go again, so that those of one
parameter are there at a time, and each gradient is given up as soon as it has been used. The arithmetic is AdamW's own.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from sft_core.allocator import release_freed_memory


class OffloadedAdamW:
    """The steps of an AdamW whose moments live in main memory or in files below a folder."""

    def __init__(self, adamw: torch.optim.AdamW, parameters: Sequence[Parameter], where: str) -> None:
        # The largest last: by then the gradients of the others have made room for its moments.
        self.adamw, self.parameters = adamw, sorted(parameters, key=lambda p: p.numel())
        self.updates = [torch.zeros((), device=p.device) for p in self.parameters]  # AdamW counts them for each
        self.folder = None if where == "cpu" else Path(tempfile.mkdtemp(prefix="adamw-", dir=where))
        if self.folder:  # goes with this object, or with the program
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.kept = [] if self.folder else [_pinned(p) for p in self.parameters]

    def step(self) -> None:
        """One step of AdamW, a parameter at a time; leaves no gradient."""
        release_freed_memory()
        gradients = [p.grad for p in self.parameters]
        self.adamw.zero_grad(set_to_none=True)
        if all(gradient is None for gradient in gradients):
            self.adamw.step()  # moves nothing; its schedule warns of an optimizer that never stepped
        for number, parameter in enumerate(self.parameters):
            parameter.grad, gradients[number] = gradients[number], None
            if parameter.grad is not None:
                self._step_one(number, parameter)

    def _step_one(self, number: int, parameter: Parameter) -> None:
        away = self._mapped(number, parameter) if self.folder else self.kept[number]
        here = away.to(parameter.device, non_blocking=True)  # of a CPU's parameter: the same memory
        mean, square = here.view(2, *parameter.shape)
        self.adamw.state[parameter] = {"step": self.updates[number], "exp_avg": mean, "exp_avg_sq": square}
        self.adamw.step()
        if here is not away:
            away.copy_(here, non_blocking=True)
        del self.adamw.state[parameter]
        parameter.grad = None

    def _mapped(self, number: int, parameter: Parameter) -> Tensor:
        """The file of a parameter's moments as a tensor; zeros, taking no room, when it is new."""
        assert self.folder
        path = str(self.folder / str(number))
        return torch.from_file(path, shared=True, size=2 * parameter.numel(), dtype=parameter.dtype)


def _pinned(parameter: Parameter) -> Tensor:
    """Zeros for both moments in main memory that a GPU copies from and to without a detour."""
    return torch.zeros(2 * parameter.numel(), dtype=parameter.dtype, pin_memory=parameter.is_cuda)

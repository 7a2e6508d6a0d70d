"""AdamW's two moments kept elsewhere between steps: eight bytes a weight that only the update itself looks at.

On CUDA `cpu` keeps them in main memory; a folder keeps them on disk, as memory-mapped files that the system may hold in
memory or not, as it has room. AdamW works on each weight by itself, so a step can go through the weights a piece at a
time: the piece's moments come, are used and go again, and each gradient is given up as soon as it has been used. The
arithmetic is AdamW's own.
"""

from __future__ import annotations

import mmap
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

PIECE = 2**24  # weights whose moments are there at once: 128 MB of float32


class OffloadedAdamW:
    """The steps of an AdamW whose moments live in main memory or in files below a folder."""

    def __init__(self, adamw: torch.optim.AdamW, parameters: Sequence[Parameter], where: str) -> None:
        self.adamw, self.parameters = adamw, list(parameters)
        self.updates = [torch.zeros((), device=p.device) for p in self.parameters]  # AdamW counts them for each
        self.folder = None if where == "cpu" else Path(tempfile.mkdtemp(prefix="adamw-", dir=where))
        if self.folder:  # goes with this object, or with the program
            weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.kept: dict[str, Tensor] = {}  # without a folder: a piece's moments

    def step(self) -> None:
        """One step of AdamW; leaves no gradient."""
        groups = self.adamw.param_groups
        group_of = {parameter: group for group in groups for parameter in group["params"]}
        for group in groups:
            group["params"] = []
        try:
            self.adamw.step()  # moves nothing; its schedule warns of an optimizer that never stepped
            for number, parameter in enumerate(self.parameters):
                if parameter.grad is not None:
                    for piece, (weight, gradient) in enumerate(_pieces(parameter)):
                        self._step_piece(group_of[parameter], number, piece, weight, gradient)
                    self.updates[number] += 1
                    parameter.grad = None
        finally:
            for group in groups:
                group["params"] = [parameter for parameter, its in group_of.items() if its is group]

    def _step_piece(self, group: dict[str, Any], number: int, piece: int, weight: Tensor, gradient: Tensor) -> None:
        """Show AdamW one piece of a parameter as if it were all there is."""
        part = Parameter(weight)
        part.grad = gradient
        away = self._away(f"{number}-{piece}", part)
        here = away.to(part.device, non_blocking=True)  # of a CPU's parameter: the same memory
        mean, square = here.view(2, -1)
        self.adamw.state[part] = {"step": self.updates[number].clone(), "exp_avg": mean, "exp_avg_sq": square}
        group["params"] = [part]
        self.adamw.step()
        group["params"] = []
        if here is not away:
            away.copy_(here, non_blocking=True)
        del self.adamw.state[part]

    def _away(self, name: str, part: Parameter) -> Tensor:
        """Where a piece's moments are between steps; at first zeros."""
        if self.folder:
            return _mapped(self.folder / name, 2 * part.numel(), part.dtype)
        if name not in self.kept:  # pinned, so that a GPU copies from and to them without a detour
            self.kept[name] = torch.zeros(2 * part.numel(), dtype=part.dtype, pin_memory=part.is_cuda)
        return self.kept[name]


def _pieces(parameter: Parameter) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of a parameter's weights and of their gradient, PIECE at a time."""
    assert parameter.grad is not None
    yield from zip(
        parameter.detach().view(-1).split(PIECE), parameter.grad.contiguous().view(-1).split(PIECE), strict=True
    )


def _mapped(path: Path, size: int, dtype: torch.dtype) -> Tensor:
    """A file of so many numbers as a tensor; zeros when it is new."""
    length = size * dtype.itemsize
    with path.open("a+b") as file:
        file.truncate(length)
        # Its pages all at once: faulting them in one by one took longer than the update.
        memory = mmap.mmap(file.fileno(), length, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    return torch.frombuffer(memory, dtype=dtype)

"""AdamW's two moments kept elsewhere between steps: eight bytes per weight that only the update itself needs.

On CUDA `cpu` keeps them in main memory; a folder keeps them on disk, as memory-mapped files that the system keeps in
memory while it has room. AdamW treats each weight separately, so a step can go through the weights a piece at a time:
the piece's moments are loaded, used and written back, and each gradient is freed as soon as it has been used. The
arithmetic is AdamW's own.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from sft_core.errors import Refused

PIECE = 2**24  # weights whose moments are loaded at once: 128 MB of float32


class OffloadedAdamW:
    """The steps of an AdamW whose moments live in main memory or in a file below a folder.

    The file has no name, so that it disappears with the process, however that ends.

    Raises:
        Refused: the folder's disk has no room for the moments, or cannot be written to.
    """

    def __init__(self, adamw: torch.optim.AdamW, parameters: Sequence[Parameter], where: str) -> None:
        self.adamw, self.parameters = adamw, list(parameters)
        self.updates = [torch.zeros((), device=p.device) for p in self.parameters]  # AdamW counts them for each
        self.kept: dict[tuple[int, int], Tensor] = {}  # without a file: a piece's moments
        self.offsets: dict[tuple[int, int], int] = {}
        end = 0
        for number, parameter in enumerate(self.parameters):
            for piece, part in enumerate(parameter.detach().view(-1).split(PIECE)):
                self.offsets[number, piece] = end
                end += _whole_pages(2 * part.numel() * part.element_size())
        self.file = None if where == "cpu" else _file_of_zeros(where, end)
        if self.file is not None:
            weakref.finalize(self, os.close, self.file)

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
        """Give AdamW one piece of a parameter as if it were the whole."""
        part = Parameter(weight)
        part.grad = gradient
        away = self._away(number, piece, part)
        here = away.to(part.device, non_blocking=True)  # of a CPU's parameter: the same memory
        mean, square = here.view(2, -1)
        self.adamw.state[part] = {"step": self.updates[number].clone(), "exp_avg": mean, "exp_avg_sq": square}
        group["params"] = [part]
        self.adamw.step()
        group["params"] = []
        if here is not away:
            away.copy_(here, non_blocking=True)
        del self.adamw.state[part]

    def _away(self, number: int, piece: int, part: Tensor) -> Tensor:
        """Where a piece's moments are between steps; at first zeros."""
        if self.file is not None:
            return _mapped(self.file, self.offsets[number, piece], 2 * part.numel(), part.dtype)
        if (number, piece) not in self.kept:
            pinned = part.device.type != "cpu"  # so that a GPU copies from and to them without a detour
            self.kept[number, piece] = torch.zeros(2 * part.numel(), dtype=part.dtype, pin_memory=pinned)
        return self.kept[number, piece]

    def tensors(self) -> dict[str, Tensor]:
        """The moments and the count of updates of each parameter that has moved, as `Optimizer.tensors` names them."""
        found: dict[str, Tensor] = {}
        for number, parameter in enumerate(self.parameters):
            if self.updates[number]:
                found[f"{number}.step"] = self.updates[number]
                for piece, part in enumerate(parameter.detach().view(-1).split(PIECE)):
                    mean, square = self._away(number, piece, part).view(2, -1)
                    found |= {f"{number}.exp_avg.{piece}": mean, f"{number}.exp_avg_sq.{piece}": square}
        return found

    def put(self, number: int, updates: Tensor, mean: Tensor, square: Tensor) -> None:
        """Set a parameter's moments, given as flat tensors."""
        self.updates[number].copy_(updates)
        parts = (mean.split(PIECE), square.split(PIECE), self.parameters[number].detach().view(-1).split(PIECE))
        for piece, (*moments, part) in enumerate(zip(*parts, strict=True)):
            self._away(number, piece, part).copy_(torch.cat(moments))


def _pieces(parameter: Parameter) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of a parameter's weights and of their gradient, PIECE at a time."""
    assert parameter.grad is not None
    yield from zip(
        parameter.detach().view(-1).split(PIECE), parameter.grad.contiguous().view(-1).split(PIECE), strict=True
    )


def _whole_pages(length: int) -> int:
    return -(-length // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY


def _file_of_zeros(where: str, length: int) -> int:
    """The descriptor of a nameless file of this length. Its space is allocated at once: a disk that turns out full
    later is a bus error."""
    try:
        with tempfile.TemporaryFile(dir=where) as named:
            file = os.dup(named.fileno())
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, length)
        else:
            os.truncate(file, length)
    except OSError as error:
        reason = f"no room for the optimizer's {length / 1e9:.1f} GB there ({error.strerror})"
        raise Refused(f"--offload_optimizer {where}: {reason}") from error
    return file


def _mapped(file: int, offset: int, size: int, dtype: torch.dtype) -> Tensor:
    """The file's numbers as a tensor."""
    # Its pages all at once: faulting them in one by one took longer than the update.
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
    return torch.frombuffer(mmap.mmap(file, size * dtype.itemsize, flags=flags, offset=offset), dtype=dtype)

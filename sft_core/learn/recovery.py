"""What the optimizer does when something goes wrong: memory that runs out, a loss or gradient that is not finite."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from sft_core.learn import ranks
from sft_core.learn.rows import Rows, Tokens
from sft_core.learn.shards import whole

Learned = TypeVar("Learned")


class Recovery:
    """The part of `Optimizer` that a healthy run never needs."""

    parameters: list[torch.nn.Parameter]
    adamw: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    loss: torch.Tensor  # of the current pass
    micro_batch: int | Tokens
    max_skipped: int
    shared: bool  # the weights, among ranks
    initial_scale: float
    learned: tuple[Rows, Callable[[slice, Rows], Any]] | None = None  # by the current pass
    skipped = skipped_in_a_row = 0

    def __init__(self) -> None:
        self.skipped_rows: list[int] = []  # those at fault since the list was last emptied

    def _until_it_fits(self, run: Callable[[], list[Learned]], rows: Rows) -> list[Learned]:
        """Call `run`, with micro-batches half as large each time memory runs out. A backward pass that failed may
        have left part of its gradient, so all rows are repeated: the sum is the same however they are cut."""
        while True:
            try:
                return run()
            except RuntimeError as error:
                smaller = halved(self.micro_batch, rows) if out_of_memory(error) and not self.shared else None
                if not smaller:
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold the tensors that were too much
            self.adamw.zero_grad(set_to_none=True)
            self.micro_batch = smaller
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: from here on {size_text(smaller)} at a time; the gradient is the same")

    def _count(self, finite: bool, scale: float) -> bool:
        """Count a step that was skipped because its loss or gradient is not finite; return whether to repeat it.

        An overflow under fp16 is not the batch's fault: the scaler halves its factor and the same batch is
        repeated, down to factor 1. What is still not finite then, or ever under bf16 and float32, is skipped: the same
        batch would fail again. Its rows are then passed one by one, to find those at fault.
        """
        again = not finite and 1 <= self.scaler.get_scale() < scale
        if finite:
            self.skipped_in_a_row = 0
        elif not again:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.skipped_rows = sorted({*self.skipped_rows, *self._rows_at_fault(scale)})
            self.scaler.update(self.initial_scale)  # the next batch should not pay for this one
        self.learned = None
        return again

    def _rows_at_fault(self, scale: float) -> list[int]:
        """The rows whose loss or gradient is not finite even when each is passed by itself, at this factor: in one
        pass with others, a row's NaN can spread to its neighbours' gradients."""
        if not self.learned:
            return []
        (rows, learn), found = self.learned, []
        # Of weights that are shared out a row has its gradient only where all ranks pass it.
        with ranks.alone() if self.shared else nullcontext():
            for at, row in rows.micro_batches(1):
                self.scaler.update(scale)
                learn(at, row)
                self.scaler.unscale_(self.adamw)
                norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, float("inf")))
                if not (math.isfinite(norm) and math.isfinite(self.loss)):
                    found.append(at.start)
                self._forget()
            return [row for part in ranks.gathered(found, "rows at fault") for row in part]

    def _forget(self) -> None:
        """Begin the next pass: no gradient, no loss."""
        self.adamw.zero_grad(set_to_none=True)
        self.loss = torch.zeros(())

    def stop_if_lost(self, step: int, hint: str) -> None:
        """`hint`: where to find the rows at fault in this step.

        Raises:
            FloatingPointError: --max_skipped steps in a row were skipped: the weights, not the batch, are at fault.
        """
        if self.skipped_in_a_row < self.max_skipped:
            return
        numbers = ", ".join(map(str, self.skipped_rows[:20]))
        more = f" and {len(self.skipped_rows) - 20} more" if len(self.skipped_rows) > 20 else ""
        rows = f"by itself each of its rows {numbers}{more} ({hint})" if self.skipped_rows else "no row by itself"
        count = f"{self.skipped_in_a_row} step{'s' * (self.skipped_in_a_row > 1)} in a row"
        raise FloatingPointError(f"{count} had a loss or gradient that is not finite; in the last, step {step}, {rows}")


def halved(size: int | Tokens, rows: Rows) -> int | Tokens | None:
    """Half of what these rows make of a micro-batch; None where each row is one already.

    >>> from sft_core.learn.rows import pack_rows
    >>> rows = pack_rows([[1, 2], [1, 2]], [[3, 4, 5], [6]], pad_id=0)
    >>> halved(8, rows), halved(1, rows), halved(Tokens(100), rows), halved(Tokens(3), rows)
    (1, None, Tokens(count=3, padded=False), None)
    """
    if isinstance(size, int):
        return -(-min(size, len(rows)) // 2) if size > 1 else None
    parts = [at for at, _ in rows.micro_batches(size)]
    tokens = rows.tokens(size.padded)
    largest = max(tokens(at.start, at.stop) for at in parts)
    return replace(size, count=-(-largest // 2)) if any(at.stop - at.start > 1 for at in parts) else None


def size_text(size: int | Tokens, rows: int | None = None) -> str:
    """For people; `rows`: how many there are."""
    return f"{min(size, rows or size)} rows" if isinstance(size, int) else f"up to {size.count:,} tokens"


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator, CUDA's or the CPU's, ran out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

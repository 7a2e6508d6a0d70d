"""The optimizer: gradients summed over micro-batches that fit, AdamW over float32 masters, its learning-rate schedule,
and one step under a GradScaler."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import get_scheduler

from sft_core.config import OptimConfig
from sft_core.offload import OffloadedAdamW
from sft_core.policy import Policy
from sft_core.rows import Rows

Learned = TypeVar("Learned")


class Optimizer:
    """What `loss.backward()` leaves in `.grad`, turned into a step. `lr` is the rate that the next step will use."""

    def __init__(self, policy: Policy, config: OptimConfig, total_steps: int) -> None:
        decayed = [p for name, p in policy.trainable() if p.ndim >= 2]
        kept = [p for name, p in policy.trainable() if p.ndim < 2]  # biases and norms
        self.parameters = decayed + kept
        self.micro_batch = config.micro_batch
        self.max_grad_norm = config.max_grad_norm or float("inf")
        self.scaler = policy.precision.grad_scaler()
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        where = config.offload_optimizer
        self.offloaded = OffloadedAdamW(self.adamw, self.parameters, where) if where else None
        warmup_steps = round(config.warmup_ratio * total_steps)
        name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        self.schedule = get_scheduler(name, self.adamw, warmup_steps, total_steps)
        self.initial_scale = self.scaler.get_scale()
        self.max_skipped = config.max_skipped
        self.skipped = self.skipped_in_a_row = 0
        self.skipped_rows: list[int] = []  # those at fault since somebody emptied the list
        self.learned: tuple[Rows, Callable[[slice, Rows], Any]] | None = None  # by the present pass
        self.loss = torch.zeros(())  # of the present pass
        self.passes = 0  # calls of `clip_and_step`: until it grows, weights and moments are what they were

    @property
    def lr(self) -> float:
        return float(self.adamw.param_groups[0]["lr"])

    def accumulate(self, rows: Rows, learn: Callable[[slice, Rows], Learned]) -> list[Learned]:
        """Call `learn`, which computes a loss and hands it to `backward`, on all rows, a micro-batch at a time.

        Where memory runs out, micro-batches are half as large from then on. Because a backward pass that broke off may
        have left part of its gradient, all rows are begun again: the sum is the same however they are cut.
        """
        self.learned = (rows, learn)
        while True:
            try:
                return [learn(at, micro) for at, micro in rows.micro_batches(self.micro_batch)]
            except RuntimeError as error:
                if not _out_of_memory(error) or self.micro_batch == 1:
                    raise
                traceback.clear_frames(error.__traceback__)  # which hold the tensors that were too much
            self.adamw.zero_grad(set_to_none=True)
            self.micro_batch = -(-min(self.micro_batch, len(rows)) // 2)
            torch.cuda.empty_cache()
            tqdm.write(f"out of memory: from here on {self.micro_batch} rows at a time; the gradient is the same")

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient, times the scaler's factor, to `.grad`."""
        self.loss = self.loss.to(loss.device) + loss.detach()
        self.scaler.scale(loss).backward()

    def clip_and_step(self) -> tuple[float, bool]:
        """Clip, step, advance the schedule, clear the gradients. A loss or gradient that is not finite moves neither
        weights nor schedule.

        An overflow under fp16 is not the batch's fault: the scaler halves its factor and the same batch is to be
        learned again, down to factor 1. What is still not finite then, or ever under bf16 and float32, is skipped and
        counted, and the loop goes on with the next batch: the same one would end the same way. Its rows are then
        learned one by one, to find those at fault.

        Returns:
            The gradient's norm before clipping, and whether the same batch is to be learned again.
        """
        self.passes += 1
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.adamw)  # before clipping, or the bound would apply to the scaled gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        finite = math.isfinite(grad_norm) and math.isfinite(self.loss)
        if finite:
            # Not scaler.step(), which would look for overflows again.
            (self.offloaded or self.adamw).step()
            self.schedule.step()
        self.scaler.update()
        self._forget()
        again = not finite and 1 <= self.scaler.get_scale() < scale
        if finite:
            self.skipped_in_a_row = 0
        elif not again:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.skipped_rows = sorted({*self.skipped_rows, *self._rows_at_fault(scale)})
            self.scaler.update(self.initial_scale)  # the next batch should not pay for this one
        self.learned = None
        return grad_norm, again

    def _rows_at_fault(self, scale: float) -> list[int]:
        """The rows whose loss or gradient is not finite even where each is learned by itself, at this factor: in one
        pass with others, a row's NaN may be found in its neighbours' gradient too."""
        if not self.learned:
            return []
        (rows, learn), found = self.learned, []
        for at, row in rows.micro_batches(1):
            self.scaler.update(scale)
            learn(at, row)
            self.scaler.unscale_(self.adamw)
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
            if not (math.isfinite(norm) and math.isfinite(self.loss)):
                found.append(at.start)
            self._forget()
        return found

    def _forget(self) -> None:
        """Begin the next pass: no gradient, no loss."""
        self.adamw.zero_grad(set_to_none=True)
        self.loss = torch.zeros(())

    def stop_if_lost(self, step: int, hint: str) -> None:
        """`hint`: where a person finds the rows at fault in this step.

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

    def numbers(self) -> dict[str, Any]:
        """All but the moments: the schedule, the scaler, what was counted."""
        counted = {"skipped": self.skipped, "in_a_row": self.skipped_in_a_row, "micro_batch": self.micro_batch}
        return {"schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(), **counted}

    def tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's moments and its count of updates for each parameter that has moved; where they are offloaded, in
        pieces."""
        if self.offloaded:
            return self.offloaded.tensors()
        states = ((i, self.adamw.state[p]) for i, p in enumerate(self.parameters) if p in self.adamw.state)
        return {f"{i}.{name}": value for i, state in states for name, value in state.items()}

    def load(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go back to where `numbers` and `tensors` were taken, with the moments wherever this one keeps them."""
        self.schedule.load_state_dict(numbers["schedule"])
        for group, lr in zip(self.adamw.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        self.scaler.load_state_dict(numbers["scaler"])
        self.skipped, self.skipped_in_a_row = numbers["skipped"], numbers["in_a_row"]
        self.micro_batch = min(self.micro_batch, numbers["micro_batch"])
        for i, parameter in enumerate(self.parameters):
            if f"{i}.step" in tensors:
                moments = [torch.cat(_pieces_of(tensors, f"{i}.{name}")) for name in ("exp_avg", "exp_avg_sq")]
                if self.offloaded:
                    self.offloaded.put(i, tensors[f"{i}.step"], *moments)
                else:
                    mean, square = (moment.to(parameter.device).view_as(parameter) for moment in moments)
                    # The count is where AdamW had it: fused on a GPU, on the GPU.
                    step = tensors[f"{i}.step"].clone().to(parameter.device)
                    self.adamw.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}


def _pieces_of(tensors: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """The tensor of this name, or name.0, name.1, ..., each of them flat."""
    names = [name] if name in tensors else [n for n in map(f"{name}.{{}}".format, range(len(tensors))) if n in tensors]
    return [tensors[piece].flatten() for piece in names]


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator, CUDA's or the CPU's, could not give what was asked of it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

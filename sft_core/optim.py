"""The optimizer: gradients summed over micro-batches that fit, AdamW over float32 masters, its learning-rate schedule,
and one step under a GradScaler."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from typing import TypeVar

import torch
from tqdm import tqdm
from transformers import get_scheduler

from sft_core.config import OptimConfig
from sft_core.offload import OffloadedAdamW
from sft_core.policy import Policy
from sft_core.rows import Rows

Learned = TypeVar("Learned")

SKIPPED_IN_A_ROW = 5  # then the run stops: the weights, not the batch, are at fault


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
        self.skipped = self.skipped_in_a_row = 0

    @property
    def lr(self) -> float:
        return float(self.adamw.param_groups[0]["lr"])

    def accumulate(self, rows: Rows, learn: Callable[[slice, Rows], Learned]) -> list[Learned]:
        """Call `learn`, which computes a loss and hands it to `backward`, on all rows, a micro-batch at a time.

        Where memory runs out, micro-batches are half as large from then on. Because a backward pass that broke off may
        have left part of its gradient, all rows are begun again: the sum is the same however they are cut.
        """
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
        self.scaler.scale(loss).backward()

    def clip_and_step(self) -> tuple[float, bool]:
        """Clip, step, advance the schedule, clear the gradients. A gradient that is not finite moves neither weights
        nor schedule.

        An overflow under fp16 is not the batch's fault: the scaler halves its factor and the same batch is to be
        learned again, down to factor 1. What is still not finite then, or ever under bf16 and float32, is skipped and
        counted, and the loop goes on with the next batch: the same one would end the same way.

        Returns:
            The gradient's norm before clipping, and whether the same batch is to be learned again.
        """
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.adamw)  # before clipping, or the bound would apply to the scaled gradient
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm).item()
        finite = math.isfinite(grad_norm)
        if finite:
            # Not scaler.step(), which would look for overflows again.
            (self.offloaded or self.adamw).step()
            self.schedule.step()
        self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        again = not finite and 1 <= self.scaler.get_scale() < scale
        if finite:
            self.skipped_in_a_row = 0
        elif not again:
            self.skipped += 1
            self.skipped_in_a_row += 1
            self.scaler.update(self.initial_scale)  # the next batch should not pay for this one
        return grad_norm, again

    def stop_if_lost(self) -> None:
        """Raises:
        FloatingPointError: SKIPPED_IN_A_ROW steps in a row were skipped.
        """
        if self.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"{self.skipped_in_a_row} steps in a row had a gradient that is not finite")


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator, CUDA's or the CPU's, could not give what was asked of it."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)

"""The optimizer: gradients summed over micro-batches, AdamW over float32 masters, the learning-rate schedule, the fp16
loss scaler. Memory that runs out and gradients that are not finite: `recovery`. Checkpoints: `moments`."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import TypeVar

import torch
from transformers import get_scheduler

from rewards import TrainerState
from sft_core.config import OptimConfig
from sft_core.learn import ranks
from sft_core.learn.moments import Saved
from sft_core.learn.offload import OffloadedAdamW
from sft_core.learn.recovery import Recovery
from sft_core.learn.rows import LARGEST, Rows, Tokens
from sft_core.learn.shards import is_shared, passes, whole
from sft_core.model.policy import Policy

Learned = TypeVar("Learned")


class Optimizer(Recovery, Saved):
    """Turns what `loss.backward()` leaves in `.grad` into a step. `lr` is the rate that the next step will use."""

    def __init__(
        self, policy: Policy, config: OptimConfig, total_steps: int, micro_batch: int | Tokens | None = None
    ) -> None:
        """`micro_batch`: what memory allows under --micro_batch auto, by default as much as is ever of use."""
        super().__init__()
        decayed = [p for name, p in policy.trainable() if p.ndim >= 2]
        kept = [p for name, p in policy.trainable() if p.ndim < 2]  # biases and norms
        self.parameters = decayed + kept
        self.micro_batch = micro_batch or config.micro_batch or LARGEST
        if isinstance(self.micro_batch, Tokens):
            self.micro_batch = replace(self.micro_batch, padded=policy.layout == "rows")
        self.model, self.shared, self.counts = policy.model, is_shared(policy.model), True
        self.max_skipped = config.max_skipped
        self.max_grad_norm = config.max_grad_norm or float("inf")
        self.adamw = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=True,
        )
        place = config.offload_optimizer
        self.offloaded = OffloadedAdamW(self.adamw, self.parameters, place) if place else None
        warmup_steps = round(config.warmup_ratio * total_steps)
        name = "constant_with_warmup" if config.lr_schedule == "constant" else config.lr_schedule
        self.schedule = get_scheduler(name, self.adamw, warmup_steps, total_steps)
        self.scaler = policy.precision.grad_scaler()
        self.initial_scale = self.scaler.get_scale()
        self.loss = torch.zeros(())  # of the current pass
        self.total_steps = total_steps
        self.passes = 0  # calls of `clip_and_step`: until it grows, weights and moments are what they were

    @property
    def lr(self) -> float:
        return float(self.adamw.param_groups[0]["lr"])

    @property
    def state(self) -> TrainerState:
        """How far training is."""
        return TrainerState(self.schedule.last_epoch, self.total_steps)

    def accumulate(self, rows: Rows, learn: Callable[[slice, Rows], Learned]) -> list[Learned]:
        """Call `learn`, which computes a loss and hands it to `backward`, on all rows, a micro-batch at a time. Under
        torchrun each rank does so on its part of them, and the gradients are added up."""
        self.learned = (rows, learn)
        learned = self._until_it_fits(lambda: self._pass(rows, learn), rows)
        if not self.shared:
            ranks.add_up_gradients(self.parameters)
        self.loss = ranks.whole(self.loss, "loss")
        return [each for part in ranks.gathered(learned, "what was learned") for each in part]

    def _pass(self, rows: Rows, learn: Callable[[slice, Rows], Learned]) -> list[Learned]:
        learned: list[Learned] = []
        with ranks.at_once("gradients") if self.shared else nullcontext():
            for at, micro, counts in passes(rows, self.micro_batch, self.model):
                self.counts = counts
                learned += [learn(at, micro)][:counts]
        self.counts = True
        return learned

    def backward(self, loss: torch.Tensor) -> None:
        """Add the loss's gradient, times the scaler's factor, to `.grad`."""
        if not self.counts:
            loss = loss * 0
        self.loss = self.loss + loss.detach()
        self.scaler.scale(loss).backward()

    def clip_and_step(self) -> tuple[float, bool]:
        """Clip, step, advance the schedule, clear the gradients. A loss or gradient that is not finite moves neither
        weights nor schedule.

        Returns:
            The gradient's norm before clipping, and whether the same batch is to be repeated (fp16 only).
        """
        self.passes += 1
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.adamw)  # before clipping, or the bound would apply to the scaled gradient
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)).item()
        finite = math.isfinite(grad_norm) and math.isfinite(self.loss)
        if finite:
            # Not scaler.step(), which would look for overflows again.
            (self.offloaded or self.adamw).step()
            self.schedule.step()
        self.scaler.update()
        self._forget()
        return grad_norm, self._count(finite, scale)

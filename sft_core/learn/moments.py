"""What a checkpoint holds of an optimizer: AdamW's moments, the schedule, the loss scaler, the counters."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch

from sft_core.learn.offload import OffloadedAdamW
from sft_core.learn.rows import Tokens
from sft_core.learn.shards import part_of, whole


class Saved:
    """The part of `Optimizer` that saves and loads it."""

    parameters: list[torch.nn.Parameter]
    adamw: torch.optim.AdamW
    offloaded: OffloadedAdamW | None
    schedule: Any
    scaler: torch.amp.GradScaler
    micro_batch: int | Tokens
    skipped: int
    skipped_in_a_row: int

    def numbers(self) -> dict[str, Any]:
        """Everything but the moments: the schedule, the scaler, the counters."""
        size = self.micro_batch
        unit = "micro_batch" if isinstance(size, int) else "micro_batch_tokens"
        counted = {"skipped": self.skipped, "in_a_row": self.skipped_in_a_row}
        counted[unit] = size if isinstance(size, int) else size.count
        return {"schedule": self.schedule.state_dict(), "scaler": self.scaler.state_dict(), **counted}

    def tensors(self) -> dict[str, torch.Tensor]:
        """AdamW's moments and its count of updates for each parameter that has moved; where they are offloaded, in
        pieces."""
        if self.offloaded:
            return self.offloaded.tensors()
        states = ((i, self.adamw.state[p]) for i, p in enumerate(self.parameters) if p in self.adamw.state)
        return {f"{i}.{name}": whole(value) for i, state in states for name, value in state.items()}

    def load(self, numbers: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Go back to where `numbers` and `tensors` were taken, the moments wherever this optimizer keeps them."""
        self.schedule.load_state_dict(numbers["schedule"])
        self._set_rates()
        self.scaler.load_state_dict(numbers["scaler"])
        self.skipped, self.skipped_in_a_row = numbers["skipped"], numbers["in_a_row"]
        if isinstance(self.micro_batch, int):
            self.micro_batch = min(self.micro_batch, numbers.get("micro_batch", self.micro_batch))
        else:
            count = self.micro_batch.count
            self.micro_batch = replace(self.micro_batch, count=min(count, numbers.get("micro_batch_tokens", count)))
        for i, parameter in enumerate(self.parameters):
            if f"{i}.step" in tensors:
                moments = [torch.cat(_pieces_of(tensors, f"{i}.{name}")) for name in ("exp_avg", "exp_avg_sq")]
                if self.offloaded:
                    self.offloaded.put(i, tensors[f"{i}.step"], *moments)
                else:
                    mean, square = (part_of(moment, parameter) for moment in moments)
                    # The count stays on AdamW's device: with the fused version on a GPU, the GPU.
                    step = tensors[f"{i}.step"].clone().to(parameter.device)
                    self.adamw.state[parameter] = {"step": step, "exp_avg": mean, "exp_avg_sq": square}

    def _set_rates(self) -> None:
        """The rates of the next step, as the schedule has them for its whole length, which a longer run has changed."""
        schedule = self.schedule
        then = schedule.get_last_lr()
        now = [
            base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = now
        for group, lr in zip(self.adamw.param_groups, now, strict=True):
            group["lr"] = lr
        if now != then:
            told = f"{then[0]:g} to {now[0]:g}: it follows the schedule of a run of the new length"
            print(f"the learning rate jumps from {told}", file=sys.stderr)


def _pieces_of(tensors: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    """The tensor of this name, or name.0, name.1, ..., each of them flat."""
    names = [name] if name in tensors else [n for n in map(f"{name}.{{}}".format, range(len(tensors))) if n in tensors]
    return [tensors[piece].flatten() for piece in names]

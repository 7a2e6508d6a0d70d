"""The least time of a whole run: its steps and its evaluations at the speed of `roofline`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from grpo_core.config import GRPOConfig
from grpo_core.forecast.machine import Ceilings, machine
from grpo_core.forecast.roofline import decode, phases, prefill
from sft_core.learn.footprint import Lengths
from sft_core.model.shapes import Shapes, shapes_of
from sft_core.model.source import Source

# How many times the least time recorded steps took: benchmarks/results/step-time-qwen-0.5b.md and step-time-tiny.md.
# Small models are further from it: most of their time goes into starting products, not into computing them.
RECORDED = "recorded steps took 2 times as long (Qwen2.5-0.5B's shape on a CPU), 5 times for the built-in model"


@dataclass(frozen=True)
class Hours:
    """The least seconds of a step and of an evaluation, and how many there are of each."""

    step: float
    steps: int
    evaluation: float
    evaluations: int

    @property
    def total(self) -> float:
        """Seconds."""
        return self.step * self.steps + self.evaluation * self.evaluations

    def __str__(self) -> str:
        parts = [f"{self.steps:,} steps x {self.step:.3g} s"]
        if self.evaluations:
            parts.append(f"{self.evaluations} evaluations x {self.evaluation:.3g} s")
        return (
            f"at least {duration(self.total)}: {' + '.join(parts)}, by arithmetic and memory traffic alone; {RECORDED}"
        )


def duration(seconds: float) -> str:
    """
    >>> duration(12), duration(600), duration(9000), duration(900000)
    ('12 s', '10 min', '2.5 h', '250 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def least_hours(
    config: GRPOConfig,
    shapes: Shapes,
    half: bool,
    lengths: Lengths,
    ceilings: Ceilings,
    steps: int,
    evaluations: int,
    problems: int,
) -> Hours:
    """
    Args:
        half: under autocast.
        problems: of an evaluation; each gets a greedy answer and --eval_samples more.
    """
    step = sum(phase.seconds(ceilings) for phase in phases(config, shapes, half, lengths).values())
    answers = problems * (1 + config.eval_samples)
    batch = replace(config, prompts_per_step=min(config.eval_batch_size, answers), group_size=1, share_prompts=False)
    seconds = sum(phase(batch, shapes, half, lengths).seconds(ceilings) for phase in (prefill, decode))
    return Hours(step, steps, seconds * -(-answers // config.eval_batch_size), evaluations if problems else 0)


def hours_line(config: GRPOConfig, source: Source | None, lengths: Lengths, steps: int, evaluations: int) -> str:
    """For --dry_run: the least time on this machine, whose speed is measured, which takes about two seconds."""
    try:
        here = machine("this", config.device)
        dtype = here.dtype(config.precision)
        shapes, half, ceilings = shapes_of(config, source), dtype != torch.float32, here.ceilings(dtype)
        found = least_hours(config, shapes, half, lengths, ceilings, steps, evaluations, config.eval_problems)
    except Exception as error:  # whatever a model of another kind lacks
        return f"no forecast for this model ({type(error).__name__}: {str(error)[:100]})"
    return f"{found}; {here.name}, as busy as it is now, completions of {lengths.completion} tokens"

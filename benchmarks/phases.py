"""A clock around each phase of a workload's steps, and what each would take at the machine's ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch

import eval.going
import grpo_core.step
from benchmarks.memory import peak_bytes, reset_peak
from benchmarks.workload import Steps
from grpo_core.forecast.machine import Ceilings
from grpo_core.forecast.roofline import phases
from grpo_core.step import StepReport
from sft_core.learn.clock import now
from sft_core.learn.footprint import Lengths
from sft_core.model.shapes import shapes_of
from sft_core.model.source import find_source

PHASES = ("prefill", "decode", "reward", "reference", "learner", "optimizer")


@dataclass
class Clock:
    """Seconds and peak bytes of each phase of the steps so far. A phase within another (prefill in sampling) takes its
    time from it."""

    device: torch.device
    seconds: list[dict[str, float]] = field(default_factory=list)  # step -> phase -> seconds
    peak: dict[str, int] = field(default_factory=dict)

    def around(self, phase: str, function: Callable[..., Any], outer: str | None = None) -> Callable[..., Any]:
        """The same function, timed as this phase."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            reset_peak(self.device)
            began = now(self.device)
            result = function(*args, **kwargs)
            took = now(self.device) - began
            self._add(phase, took)
            if outer:
                self._add(outer, -took)
            self.peak[phase] = max(self.peak.get(phase, 0), peak_bytes(self.device))
            return result

        return timed

    def _add(self, phase: str, seconds: float) -> None:
        self.seconds[-1][phase] = self.seconds[-1].get(phase, 0.0) + seconds


@contextmanager
def timed_phases(steps: Steps) -> Iterator[tuple[Steps, Clock]]:
    """The same steps with a clock around each phase."""
    learner = steps.learner
    clock = Clock(learner.policy.device)
    places: list[tuple[Any, str, str, str | None]] = [
        (eval.going, "prefill_once", "prefill", "decode"),
        (grpo_core.step, "score_groups", "reward", None),
        (learner.optimizer, "accumulate", "learner", None),
        (learner.optimizer, "clip_and_step", "optimizer", None),
    ]
    if learner.reference:
        places.append((learner.reference, "logprobs", "reference", None))
    with ExitStack() as stack:
        for owner, name, phase, outer in places:
            stack.enter_context(patch.object(owner, name, clock.around(phase, getattr(owner, name), outer)))
        sampler = clock.around("decode", learner.sampler)
        yield Steps(replace(learner, sampler=sampler), steps.source), clock


def measured(steps: Steps, count: int, warm_up: int) -> tuple[Clock, list[StepReport], list[float]]:
    """Time `count` steps after a warm-up: the clock, the reports, and whole steps' seconds."""
    reports, whole = [], []
    with timed_phases(steps) as (clocked, clock):
        for number in range(warm_up + count):
            if number == warm_up:
                clock.seconds.clear()
            clock.seconds.append({})
            report = clocked()
            if number >= warm_up:
                reports.append(report)
                whole.append(report.clock.total)
    return clock, reports, whole


def least_seconds(steps: Steps, reports: Sequence[StepReport], ceilings: Ceilings) -> dict[str, float]:
    """What each phase would take if it ran at a ceiling of the machine, for the lengths that were met."""
    config, policy = steps.learner.config, steps.learner.policy
    lengths = Lengths(*(round(_mean_length(reports, name)) for name in ("prompt_len_N", "completion_len_N")))
    half = policy.precision.autocast_dtype is not None
    found = phases(config, shapes_of(config, find_source(config)), half, lengths)
    return {name: phase.seconds(ceilings) for name, phase in found.items()}


def _mean_length(reports: Sequence[StepReport], name: str) -> float:
    return statistics.mean(float(getattr(report.rollout.samples.rows, name).float().mean()) for report in reports)

"""Where a step's time and memory go: `python -m benchmarks.step_time tiny`

Takes a workload's steps one after the other and reports, for each phase, the median time, tokens a second, the peak
memory while it ran, and how close it comes to what this machine's arithmetic and memory traffic allow. Any flag of
grpo_core.train may follow the workload: `python -m benchmarks.step_time qwen-0.5b --model FOLDER --half_copies False`.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import eval.sampling
import grpo_core.step
from benchmarks.memory import peak_bytes, reset_peak
from benchmarks.workload import Steps, names, with_start, workload
from grpo_core.config import GRPOConfig
from grpo_core.forecast.machine import Ceilings
from grpo_core.forecast.machine import measured as ceilings_of
from grpo_core.forecast.memory import GB, Lengths
from grpo_core.forecast.roofline import phases
from grpo_core.step import StepReport
from rewards.tables import markdown
from sft_core.cli import parser_of, user_errors
from sft_core.helptext import Help, Parser
from sft_core.learn.clock import now
from sft_core.model.shapes import shapes_of
from sft_core.model.source import find_source
from sft_core.run.provenance import provenance, shown_flags

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
        (eval.sampling, "prefill_once", "prefill", "decode"),
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


def table(clock: Clock, reports: Sequence[StepReport], whole: Sequence[float], least: dict[str, float]) -> str:
    """A line for each phase, and one for the whole step. `least`: the seconds that a phase must take."""
    completion = statistics.mean(int(report.rollout.samples.rows.completion_len_N.sum()) for report in reports)
    rows = [["phase", "seconds (median)", "share", "completion tokens/s", "of the machine's ceiling", "peak memory"]]
    total = statistics.median(whole)
    for phase in PHASES:
        seconds = statistics.median(step.get(phase, 0.0) for step in clock.seconds)
        if seconds:
            reached = f"{least[phase] / seconds:.0%}" if phase in least else ""
            numbers = [f"{seconds:.3f}", f"{seconds / total:.0%}", f"{completion / seconds:.0f}", reached]
            rows.append([phase, *numbers, f"{clock.peak[phase] / GB:.2f} GB"])
    peak = f"{max(clock.peak.values()) / GB:.2f} GB"
    reached = f"{sum(least.values()) / total:.0%}"
    rows.append(["**step**", f"{total:.3f}", "", f"{completion / total:.0f}", reached, peak])
    return markdown(rows)


def least_seconds(steps: Steps, reports: Sequence[StepReport], ceilings: Ceilings) -> dict[str, float]:
    """What each phase would take if it ran at a ceiling of the machine, for the lengths that were met."""
    config, policy = steps.learner.config, steps.learner.policy
    lengths = Lengths(*(round(_mean_length(reports, name)) for name in ("prompt_len_N", "completion_len_N")))
    half = policy.precision.autocast_dtype is not None
    found = phases(config, shapes_of(config, find_source(config)), half, lengths)
    return {name: phase.seconds(ceilings) for name, phase in found.items()}


def _mean_length(reports: Sequence[StepReport], name: str) -> float:
    return statistics.mean(float(getattr(report.rollout.samples.rows, name).float().mean()) for report in reports)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        [],
        prog="python -m benchmarks.step_time",
        description=__doc__,
        formatter_class=Help,
        allow_abbrev=False,
        others=[parser_of(GRPOConfig)],
    )
    parser.add_argument("workload", choices=names(), metavar="WORKLOAD", help=", ".join(names()))
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="timed steps")
    parser.add_argument("--warm_up", type=int, default=2, metavar="N", help="steps before them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report as Markdown, too")
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        options, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
        if options.steps < 1 or options.warm_up < 0:
            parser.error("--steps: expected 1 or more; --warm_up: 0 or more")
        config = workload(options.workload, ["--max_steps", str(options.steps + options.warm_up), *flags])
        steps = Steps.of(with_start(config, Path(folder)))
        clock, reports, whole = measured(steps, options.steps, options.warm_up)
        dtype = steps.learner.policy.precision.autocast_dtype or torch.float32
        ceilings = ceilings_of(clock.device, dtype)
        report = table(clock, reports, whole, least_seconds(steps, reports, ceilings))
    origin = provenance(None)
    text = "\n".join(
        [
            f"# Step time: `{options.workload}`",
            "",
            f"{options.steps} steps after {options.warm_up} of warm-up. Ceilings measured here: "
            f"{ceilings.flops / 1e9:.0f} Gflop/s in {str(dtype).removeprefix('torch.')}, "
            f"{ceilings.bytes / GB:.1f} GB/s; a phase's share of them is its roofline time "
            "(grpo_core/forecast/roofline.py) over its own.",
            "",
            report,
            "",
            f"`python -m benchmarks.step_time {shown_flags([options.workload, *flags])}`",
            "",
            f"{'; '.join(origin['hardware'])}; torch {torch.__version__}; commit {origin['commit']}",
        ]
    )
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()

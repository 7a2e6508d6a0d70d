"""A workload's step against its completions' length: `python -m benchmarks.step_time WORKLOAD --lengths 64,256`"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.phases import least_seconds, measured
from benchmarks.workload import Steps
from grpo_core.config import GRPOConfig
from grpo_core.forecast.machine import Ceilings
from rewards.tables import markdown

PHASES = {"decode": "sampler", "learner": "learner", "reference": "reference"}
APART = "learner, rows apart"


@dataclass(frozen=True)
class Length:
    """Seconds a step by phase at one --max_completion_tokens, and what they would be at the machine's ceilings."""

    tokens: int
    completion: float  # tokens that a completion has on average
    seconds: dict[str, float]
    least: dict[str, float]


def by_length(config: GRPOConfig, lengths: Sequence[int], ceilings: Ceilings, count: int, warm_up: int) -> list[Length]:
    """`count` steps at each length after `warm_up`, and as many with rows apart, of which the learner's time counts."""
    found = []
    for tokens in lengths:
        at_length = replace(config, max_completion_tokens=tokens)
        steps = Steps.of(at_length)
        clock, reports, _ = measured(steps, count, warm_up)
        medians = {
            title: statistics.median(step[phase] for step in clock.seconds)
            for phase, title in PHASES.items()
            if phase in clock.seconds[0]
        }
        ceiling = least_seconds(steps, reports, ceilings)
        least = {title: ceiling[phase] for phase, title in PHASES.items() if phase in ceiling}
        completion_len_N = [report.rollout.samples.rows.completion_len_N.float().mean().item() for report in reports]
        apart, _, _ = measured(Steps.of(replace(at_length, share_prompts=False)), count, warm_up)
        medians[APART] = statistics.median(step["learner"] for step in apart.seconds)
        found.append(Length(tokens, statistics.mean(completion_len_N), medians, least))
    return found


def table(found: Sequence[Length]) -> str:
    """A line for each length: seconds, and in brackets how much of the machine's ceiling that is."""
    titles = list(found[0].seconds)
    rows = [["longest completion", "mean length", *titles, "rows apart / one sequence"]]
    for at in found:
        cells = [
            f"{seconds:.3g} s" + (f" ({at.least[title] / seconds:.0%})" if title in at.least else "")
            for title, seconds in at.seconds.items()
        ]
        ratio = at.seconds[APART] / at.seconds["learner"]
        rows.append([str(at.tokens), f"{at.completion:.0f}", *cells, f"{ratio:.2f}"])
    return markdown(rows)


def draw(path: Path, found: Sequence[Length]) -> None:
    """Seconds against length, both logarithmic; dotted, at the machine's ceilings."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    tokens = [at.tokens for at in found]
    for title, color in zip(found[0].seconds, ("#0072b2", "#009e73", "#cc79a7", "#d55e00"), strict=False):
        axis.plot(tokens, [at.seconds[title] for at in found], "o-", color=color, label=title)
        if title in found[0].least:
            axis.plot(tokens, [at.least[title] for at in found], ":", color=color)
    axis.set(
        xscale="log", yscale="log", xlabel="longest completion (tokens)", ylabel="seconds a step (dotted: ceilings)"
    )
    axis.set_xticks(tokens, [str(at) for at in tokens])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)

"""Where a step's time and memory go: `python -m benchmarks.step_time tiny`

Takes a workload's steps one after the other and reports, for each phase, the median time, tokens a second, the peak
memory while it ran, and how close it comes to what this machine's arithmetic and memory traffic allow. Any flag of
grpo_core.train may follow the workload: `python -m benchmarks.step_time qwen-0.5b --model FOLDER --half_copies False`.
With `--lengths 64,128,256`: how sampler, learner and reference grow with the completions' length.
"""

from __future__ import annotations

import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import lengths
from benchmarks.phases import PHASES, Clock, least_seconds, measured
from benchmarks.workload import Steps, names, with_start, workload
from grpo_core.config import GRPOConfig
from grpo_core.forecast.machine import measured as ceilings_of
from grpo_core.step import StepReport
from rewards.tables import markdown
from sft_core.cli import parser_of, user_errors
from sft_core.helptext import Help, Parser
from sft_core.learn.footprint import GB
from sft_core.precision import pick_device, pick_precision
from sft_core.run.provenance import provenance, shown_flags


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
    parser.add_argument("--lengths", metavar="N,N,...", help="steps at each of these lengths of completions, in tokens")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the report as Markdown, too")
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        options, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
        if options.steps < 1 or options.warm_up < 0:
            parser.error("--steps: expected 1 or more; --warm_up: 0 or more")
        if options.lengths and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", options.lengths):
            parser.error(f"--lengths {options.lengths}: expected numbers of tokens, such as 64,128")
        config = workload(options.workload, ["--max_steps", str(options.steps + options.warm_up), *flags])
        start = with_start(config, Path(folder))
        device = pick_device(config.device)
        dtype = pick_precision(config.precision, device).autocast_dtype or torch.float32
        ceilings = ceilings_of(device, dtype)
        if options.lengths:
            found = lengths.by_length(
                start, [int(n) for n in options.lengths.split(",")], ceilings, options.steps, options.warm_up
            )
            report, flags = lengths.table(found), [*flags, "--lengths", options.lengths]
            if options.output:
                lengths.draw(options.output.with_suffix(".png"), found)
        else:
            steps = Steps.of(start)
            clock, reports, whole = measured(steps, options.steps, options.warm_up)
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

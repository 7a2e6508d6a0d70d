"""The t4 preset's steps with no more GPU memory than a T4 has: `python -m benchmarks.sitting.t4`

Any flag of grpo_core.train may follow. Exit code 1 where memory ran out, so that micro-batches were halved, or where
the last step's gradient was not finite. On a CPU nothing is limited.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence

import torch

from benchmarks.phases import measured
from benchmarks.step_time import table
from benchmarks.workload import Steps, workload
from sft_core.cli import user_errors
from sft_core.precision import pick_device

GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after one of warm-up")
    parser.add_argument("--gib", type=float, default=15.0, help="of GPU memory (default: %(default)s)")
    given, flags = parser.parse_known_args(argv)
    with user_errors():
        config = workload("t4", ["--max_steps", str(given.steps + 1), *flags])
        device = pick_device(config.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.gib * GIB / total))
    steps = Steps.of(config)
    optimizer = steps.learner.optimizer
    clock, reports, whole = measured(steps, given.steps, warm_up=1)
    print(table(clock, reports, whole, {}))
    tokens = statistics.mean(int(report.rollout.samples.rows.completion_len_N.sum()) for report in reports)
    held = f", {torch.cuda.memory_reserved(device) / GIB:.2f} held by the allocator" if on_gpu else ""
    print(
        f"figure: {steps.learner.policy.precision.name}, peak "
        f"{max(clock.peak.values()) / GIB:.2f} GiB of {given.gib:g}{held}; {statistics.median(whole):.2f} s a step of "
        f"{tokens:.0f} tokens; loss scale {optimizer.scaler.get_scale():g}, {optimizer.skipped} skipped; micro-batches "
        f"of {optimizer.micro_batch}"
    )
    wrong = []
    if optimizer.micro_batch != config.micro_batch:
        wrong.append(f"memory ran out: micro-batches of {config.micro_batch} became {optimizer.micro_batch}")
    if not math.isfinite(reports[-1].grad_norm):
        wrong.append(f"the last gradient's norm is {reports[-1].grad_norm}")
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())

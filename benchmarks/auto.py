"""Does `--micro_batch auto` fit into its memory, and is it fast? `python -m benchmarks.auto`

Random shapes of models and steps. Each takes two steps under `--memory LIMIT`, in a process that cannot get more. Then,
without a limit, one step's rows are learned in micro-batches of the size that was chosen and of 1, 2, 4, ... rows, in
turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.workload import Steps, with_start, workload
from grpo_core.config import GRPOConfig
from grpo_core.forecast.memory import plan
from rewards.tables import markdown
from sft_core.learn.fit import SHARE, fit
from sft_core.learn.footprint import GB, Plan
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.recovery import size_text
from sft_core.learn.rows import LARGEST, Rows, Tokens
from sft_core.model.shapes import shapes_of
from sft_core.model.source import find_source
from sft_core.model.tiny import build_tiny
from sft_core.run.provenance import as_line, provenance

# What a limited process runs. Address space that is reserved and never used does not count.
LIMITED = """
import json, resource, sys
from pathlib import Path
from benchmarks.auto import stepped
flags, limit = json.loads(sys.argv[1]), int(sys.argv[2])
whole, own = map(int, Path("/proc/self/statm").read_text().split()[:2])
allowed = (whole - own) * resource.getpagesize() + limit
resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
print(json.dumps(stepped(flags)))
"""


def base_in(folder: Path) -> Path:
    """The built-in model's files, for models of any number of layers."""
    base = build_tiny(folder, seed=0)
    values = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k != "layer_types"}))
    return base


def some_shape(number: int, base: Path) -> list[str]:
    """Flags of a random workload: a model of up to 5 million weights, a step of 8 to 64 completions."""
    dice = random.Random(number)
    hidden = dice.choice([64, 128, 256])
    sizes = {
        "hidden_size": hidden,
        "intermediate_size": hidden * dice.choice([2, 4]),
        "num_hidden_layers": dice.choice([2, 4]),
        "num_attention_heads": 4,
        "num_key_value_heads": dice.choice([1, 2, 4]),
        "max_position_embeddings": 1024,
    }
    flags = ["--model", str(base), "--from_scratch", "--config_overrides", *(f"{k}={v}" for k, v in sizes.items())]
    flags += ["--prompts_per_step", str(dice.choice([2, 4, 8])), "--group_size", str(dice.choice([4, 8]))]
    flags += ["--max_completion_tokens", str(dice.choice([32, 64, 128])), "--eval_problems", "0"]
    flags += ["--beta", dice.choice(["0", "0.04"]), "--seed", str(number), "--max_steps", "100"]
    return [*flags, "--precision", "float32", "--micro_batch", "auto"]


def steps_of(flags: list[str]) -> Steps:
    """The workload's steps, from weights of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return Steps.of(with_start(workload("tiny", flags), Path(folder)))


def stepped(flags: list[str]) -> dict[str, Any]:
    """Two steps: the tokens of a micro-batch, how many there were, and whether it had to be halved."""
    steps = steps_of(flags)
    chosen = steps.learner.optimizer.micro_batch
    assert isinstance(chosen, Tokens)
    counts = [len(steps().updates[0]) for _ in range(2)]
    return {"tokens": chosen.count, "counts": counts, "halved": steps.learner.optimizer.micro_batch != chosen}


def limit_for(config: GRPOConfig, dice: random.Random) -> int:
    """Bytes: at least what the smallest choice is forecast to need, at most more than the largest."""
    shapes = shapes_of(config, find_source(config))

    def plan_of(config: GRPOConfig, size: int | Tokens) -> Plan:
        return plan(config, shapes, False, "cpu", None, size)

    smallest = fit(config, "cpu", 0.0, plan_of).plan
    assert smallest  # nothing fits into 0 bytes, so it is the last choice
    least, most = smallest.peak / SHARE, plan_of(config, LARGEST).peak / SHARE
    return int(least + max(most - least, 0.1 * least) * 1.2 * dice.random()) + 1


def under(limit: int, flags: list[str]) -> dict[str, Any]:
    """`stepped` in a process that gets no more than so many bytes; what it said where it failed."""
    arguments = [json.dumps([*flags, "--memory", f"{limit // 10**6}MB"]), str(limit)]
    # Nor does what each thread's allocator would reserve, 64 MB at a time.
    alone = {**os.environ, "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, env=alone)
    if ended.returncode:
        return {"failed": (ended.stderr.strip().splitlines() or ["killed"])[-1]}
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def seconds(steps: Steps, rows: Rows, size: int | Tokens) -> float:
    """Of one pass over a step's rows, forward and backward."""
    optimizer, policy = steps.learner.optimizer, steps.learner.policy
    optimizer.micro_batch = size

    def learn(at: slice, micro: Rows) -> None:
        optimizer.backward(token_logprobs(policy, micro)[0].sum())

    start = time.perf_counter()
    optimizer.accumulate(rows, learn)
    took = time.perf_counter() - start
    optimizer.adamw.zero_grad()
    return took


def row_of(number: int, base: Path, repeats: int) -> list[str]:
    """A line of the table."""
    flags = some_shape(number, base)
    config = workload("tiny", flags)
    limit = limit_for(config, random.Random(number))
    found = under(limit, flags)
    steps = steps_of(flags)
    rows, auto = steps().rollout.samples.rows, Tokens(found.get("tokens", LARGEST.count))
    sizes: list[int | Tokens] = [auto, *(2**k for k in range(len(rows).bit_length()))]
    taken: dict[int | Tokens, list[float]] = {size: [] for size in sizes}
    for turn in range(repeats + 1):  # the first is not counted
        for size in sizes[:: -1 if turn % 2 else 1]:
            taken[size].append(seconds(steps, rows, size))
    medians = {size: median(times[1:]) for size, times in taken.items()}
    best = min(sizes[1:], key=lambda size: medians[size])
    weights = sum(p.numel() for p in steps.learner.policy.model.parameters())
    outcome = found.get("failed") or ("halved" if found["halved"] else "yes")
    return [
        f"{weights / 1e6:.1f} M",
        f"{len(rows)} x {config.max_completion_tokens}",
        f"{limit / GB:.2f} GB",
        outcome,
        size_text(auto),
        str(max(found.get("counts", [0]))),
        f"{medians[auto]:.2f} s",
        f"{medians[best]:.2f} s ({size_text(best)})",
        f"{medians[auto] / medians[best]:.2f}",
    ]


def main() -> None:
    """The table, on the screen or in a file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.auto", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shapes", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--repeats", type=int, default=3, help="of which the median is taken (default: 3)")
    parser.add_argument("--output", type=Path, help="write Markdown here, too")
    given = parser.parse_args()
    table = [["weights", "completions", "limit", "sufficed", "micro-batches", "of them", "auto", "best fixed", "ratio"]]
    with tempfile.TemporaryDirectory() as folder:
        base = base_in(Path(folder))
        for number in range(given.shapes):
            table.append(row_of(number, base, given.repeats))
            print(" | ".join(table[-1]), flush=True)
    report = f"{(__doc__ or '').strip()}\n\n{as_line(provenance(seed=None))}\n\n{markdown(table)}\n"
    print(report)
    if given.output:
        given.output.write_text(f"# Micro-batches that memory decides\n\n{report}", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

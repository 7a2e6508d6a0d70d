"""The page beside the real thing: does `grpo_core.one_page` learn the embedded job as `grpo_core.train` does?

    for seed in 42 1 2; do python -m grpo_core.train --seed $seed --output_dir runs/seed-$seed; done
    python -m benchmarks.page_curve runs/seed-42 runs/seed-1 runs/seed-2 --output benchmarks/results/one-page

For each run of the embedded job the page starts from the same supervised model, with the same seed and problems.
Writes both learning curves to OUTPUT.json and a table to OUTPUT.md. The two draw samples of their own, so their curves
differ by chance.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval.statistics import wilson_interval
from grpo_core import one_page
from grpo_core.config import GRPOConfig
from grpo_core.doctor.readlog import read_config
from grpo_core.warmstart import tiny_sft
from rewards.jsonl import read_jsonl
from rewards.tables import markdown
from sft_core.run.provenance import as_line, provenance

EVERY = 10  # steps that a figure of the table averages over

Curve = dict[str, Any]  # before, after: held-out accuracy; reward: the mean of each step


def of_the_page(start: Path, seed: int) -> Curve:
    """A run of the page from this model."""
    rewards: list[float] = []
    taken, one_page.seed = one_page.step, seed

    def noting(*parts: Any) -> tuple[float, float]:
        reward, length = taken(*parts)
        rewards.append(reward)
        return reward, length

    one_page.step = noting
    try:
        before, after = one_page.learn_from_rewards(str(start))
    finally:
        one_page.step = taken
    return {"before": before, "after": after, "reward": rewards}


def of_the_run(folder: Path) -> Curve:
    """A run of grpo_core.train, from its log."""
    lines = read_jsonl(folder / "log.jsonl")
    accuracy = [line["accuracy"] for line in lines if line["kind"] == "eval"]
    rewards = [line["reward_mean"] for line in lines if line["kind"] == "train"]
    return {"before": accuracy[0], "after": accuracy[-1], "reward": rewards}


def table(curves: dict[int, dict[str, Curve]], problems: int) -> str:
    """Held-out accuracy before and after, and the mean reward of every ten steps, of both for each seed."""
    steps = len(next(iter(curves.values()))["page"]["reward"])
    rows = [["seed", "program", "before", "after", *(f"to step {at}" for at in range(EVERY, steps + 1, EVERY))]]
    for seed, both in curves.items():
        for name, curve in both.items():
            low, high = wilson_interval(round(curve["after"] * problems), problems)
            means = [sum(curve["reward"][at - EVERY : at]) / EVERY for at in range(EVERY, steps + 1, EVERY)]
            after = f"{curve['after']:.1%} [{low:.1%}, {high:.1%}]"
            rows.append([str(seed), name, f"{curve['before']:.1%}", after, *(f"{mean:.2f}" for mean in means)])
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of the embedded job")
    parser.add_argument("--output", type=Path, required=True, help="where the record goes, without its ending")
    given = parser.parse_args(argv)
    curves: dict[int, dict[str, Curve]] = {}
    for run in given.runs:
        config = replace(GRPOConfig(**read_config(run)), output_dir=str(run))
        page = of_the_page(tiny_sft(config), config.seed)
        curves[config.seed] = {"page": page, "grpo_core.train": of_the_run(run)}
    about = provenance(seed=None)
    text = [
        "# The page beside the real thing",
        "`python -m benchmarks.page_curve RUNS`: `grpo_core.one_page` and `grpo_core.train` on the embedded job, from "
        "the same supervised model, on the same problems, with samples of their own. Greedy accuracy on 512 held-out "
        f"problems with 95% Wilson intervals, then the mean reward of each {EVERY} steps.",
        table(curves, problems=512),
        as_line(about),
    ]
    given.output.with_suffix(".md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    given.output.with_suffix(".json").write_text(json.dumps({"about": about, "curves": curves}, indent=1) + "\n")
    print(table(curves, problems=512))


if __name__ == "__main__":
    main()

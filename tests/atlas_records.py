"""Made records of an atlas, for tests of what is computed from records. Nothing here was trained."""

from __future__ import annotations

from typing import Any

import numpy as np

SAMPLES = 4  # of each held-out problem
Effects = dict[str, tuple[str, float]]  # an experiment's question, and what it adds to the log-odds of a right answer

EFFECTS: dict[str, Effects] = {
    "ways": {
        "baseline": ("baseline", 0.0),
        "baseline again": ("baseline", 0.0),
        "shuffled rewards": ("control", -2.0),
        "mu 2": ("mu", 0.1),
        "mu 4": ("mu", 0.8),
        "mu 8, no clipping": ("mu", -2.5),
        "group 4": ("group size", -0.5),
        "group 16": ("group size", 0.0),
        "TRL": ("TRL", 0.0),
    },
    "budget": {
        "baseline": ("baseline", 0.0),
        "shuffled rewards": ("control", -2.0),
        "Dr. GRPO": ("length", 0.05),
        "mask cut-off rows": ("length", 0.6),
    },
}


def right(log_odds_P: Any, draw: np.random.Generator, samples: int = SAMPLES) -> dict[str, Any]:
    """An evaluation of problems with these log-odds."""
    share_P = 1 / (1 + np.exp(-log_odds_P))
    return {
        "greedy": "".join(str(int(share > 0.5)) for share in share_P),
        "sampled": "".join(map(str, draw.binomial(samples, share_P))),
        "samples": samples,
        "right_length": 21.0 + draw.normal(),
        "wrong_length": 19.0 + draw.normal(),
        "truncated": float(draw.uniform(0, 0.1)),
        "length": 20.0,
    }


def curve(effect: float, seed_effect: float, draw: np.random.Generator) -> dict[str, Any]:
    """Sixteen points that rise from 20%."""
    steps = np.arange(5, 85, 5)
    accuracy = 1 / (1 + np.exp(1.4 - (2.4 + effect + seed_effect) * steps / 80)) + draw.normal(0, 0.015, len(steps))
    by_step = {
        "accuracy": accuracy,
        "reward": accuracy,
        "entropy": 0.9 - (0.4 + 0.1 * effect) * steps / 80 + draw.normal(0, 0.01, len(steps)),
        "length": 15 + 8 * accuracy,
        "right_length": 16 + 8 * accuracy,
        "wrong_length": 14 + 8 * accuracy,
        "truncated": np.full(len(steps), 0.02),
        "flat": 0.1 + 0.3 * accuracy,
        "clipped": np.full(len(steps), 0.01 + 0.01 * abs(effect)),
        "kl": steps / 800,
        "gradient": 1 + draw.uniform(0, 0.1, len(steps)),
    }
    found: dict[str, Any] = {"step": steps.tolist(), **{name: values.tolist() for name, values in by_step.items()}}
    found["wrong_length"][-1] = None  # no wrong answer
    return found | {"rewards": {"correct": by_step["accuracy"].tolist()}}


def record(task: str, experiment: str, seed: int, question: str, effect: float, problems: int) -> dict[str, Any]:
    """A run. Runs of a task and seed share a start, and all runs of a task their problems."""
    start, alone = np.random.default_rng(seed), np.random.default_rng([seed, *map(ord, task + experiment)])
    hard_P = np.random.default_rng(len(task)).normal(0, 1.0, problems)
    seed_effect = start.normal(0, 0.25) + alone.normal(0, 0.1)
    gain = 0.0 if experiment == "shuffled rewards" else 1.8 + effect
    return {
        "task": task,
        "experiment": experiment,
        "seed": seed,
        "question": question,
        "change": [] if "baseline" in experiment else ["--flag", experiment.split()[-1]],
        "commit": "0123abc",
        "versions": "torch 2",
        "processor": "a processor",
        "seconds": 20.0 + start.uniform(),
        "before": right(hard_P - 1.2 + start.normal(0, 0.1), start),
        "after": right(hard_P - 1.2 + gain + seed_effect, alone),
        "curve": curve(-2.4 if experiment == "shuffled rewards" else effect, seed_effect, alone),
    }


def records(problems: int = 64, effects: dict[str, Effects] = EFFECTS) -> list[dict[str, Any]]:
    """Five runs of each experiment; the baseline's second five have other seeds, and TRL all ten."""
    seeds = {"baseline again": range(6, 11), "TRL": range(1, 11)}
    return [
        record(task, name, seed, question, effect, problems)
        for task, named in effects.items()
        for name, (question, effect) in named.items()
        for seed in seeds.get(name, range(1, 6))
    ]

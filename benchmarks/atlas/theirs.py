"""A task's baseline in TRL's trainer: the same start, problems, rewards and settings, and random numbers of its own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.atlas.evaluated import answered_before, evaluated, is_right
from benchmarks.parity.compare import CLIP_METRICS, SAME_METRICS
from benchmarks.speed.theirs import trainer_of
from grpo_core.config import GRPOConfig
from grpo_core.job import prepare
from sft_core.text.prompts import FORMATS

# This project's names, and TRL's for the same.
LOGGED = SAME_METRICS | CLIP_METRICS | {"entropy": "entropy", "kl": "kl"}


def train_theirs(config: GRPOConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Train with TRL, and write the held-out answers of before and after where a run of this project has them. The
    steps' log and completions, in this project's names."""
    for name in ("trl", "transformers", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    job, folder = prepare(config), Path(config.output_dir)
    completions: list[dict[str, Any]] = []
    extract, rows = FORMATS[config.prompt_format].extract, config.prompts_per_step * config.group_size

    def sampled(texts: list[str], ids: list[list[int]], rewards: list[float], answers: list[str]) -> None:
        step = 1 + len(completions) // rows
        for text, tokens, reward, expected in zip(texts, ids, rewards, answers, strict=True):
            found = {"step": step, "extracted": extract(text) or "", "expected": expected, "tokens": len(tokens)}
            completions.append(found | {"rewards": {"reward": reward}})

    answered_before(config)
    trainer = trainer_of(job, str(folder / "trl"), sampled, logging_steps=1)
    trainer.train()
    trainer.save_model(str(folder / "final"))
    evaluated(config, str(folder / "final"), config.max_steps)
    lines = [line for line in trainer.state.log_history if "reward" in line]
    return [_line(line, completions) for line in lines], completions


def _line(theirs: dict[str, Any], completions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    step = theirs["step"]
    rows = [row for row in completions if row["step"] == step]
    line = {own: theirs.get(name) for own, name in LOGGED.items()}
    return {"kind": "train", "step": step, "accuracy": sum(map(is_right, rows)) / len(rows), **line}

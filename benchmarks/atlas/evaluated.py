"""What is right: a model's answers to held-out problems, drawn at temperature 1 whatever a run was trained with, and a
training sample."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eval.evaluate import evaluate
from grpo_core.config import GRPOConfig
from grpo_core.job import prepare
from rewards import same_number
from sft_core.model.policy import load_policy
from sft_core.model.source import find_source


def evaluated(config: GRPOConfig, model: str, step: int) -> None:
    """Write the model's answers where a run of these settings has those of this step: the same problems and random
    numbers."""
    of_model = replace(config, model=model, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
    found = evaluate(
        load_policy(of_model, find_source(of_model)),
        prepare(of_model).task.heldout,
        of_model,
        of_model.max_completion_tokens,
        of_model.eval_batch_size,
        samples=of_model.eval_samples,
        seed=of_model.seed,
    )
    folder = Path(config.output_dir) / "heldout"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(answer)) + "\n" for answer in found.answers]
    (folder / f"step-{step:06}.jsonl").write_text("".join(lines), encoding="utf-8")


def is_right(row: dict[str, Any]) -> bool:
    """Whether a training sample's answer is the expected one."""
    return bool(row["extracted"]) and same_number(row["extracted"], row["expected"])

"""What is right: a model's answers to held-out problems, drawn at temperature 1 whatever a run was trained with, and a
training sample."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from eval.evaluate import evaluate
from grpo_core.config import GRPOConfig
from grpo_core.job import prepare
from rewards import same_number
from rewards.jsonl import read_jsonl
from sft_core.model.policy import load_policy
from sft_core.model.source import find_source
from sft_core.run.lines import line_of
from sft_core.run.runlog import answers_of


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
    lines = [line_of(asdict(answer)) for answer in found.answers]
    _place(config, step).write_text("".join(lines), encoding="utf-8")


def answered_before(config: GRPOConfig) -> int:
    """Write the answers before training, which all runs of a start have in common: the first of them gives the answers
    and leaves them beside the model, the others copy them. The number of problems."""
    name = f"{config.eval_problems}x{config.eval_samples}-{config.max_completion_tokens}-{config.precision}"
    kept, own = Path(config.model).parent / f"before-{name}.jsonl", _place(config, 0)
    if kept.is_file():
        shutil.copy(kept, own)
    else:
        evaluated(config, config.model, 0)
        whole = kept.with_name(f"{kept.name}.{os.getpid()}")  # another process may do the same
        shutil.copy(own, whole)
        whole.replace(kept)
    return len(read_jsonl(own))


def _place(config: GRPOConfig, step: int) -> Path:
    path = answers_of(Path(config.output_dir), step)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def is_right(row: dict[str, Any]) -> bool:
    """Whether a training sample's answer is the expected one."""
    return bool(row["extracted"]) and same_number(row["extracted"], row["expected"])

"""--dry_run of an evaluation; what it is: sft_core/run/plan_lines.py."""

from __future__ import annotations

from collections.abc import Sequence

from eval.config import EvalConfig
from eval.trust import trusted_sampler
from sft_core.learn.footprint import GB
from sft_core.model.source import Source
from sft_core.run.plan_lines import (
    answers_text,
    first_line,
    folder_line,
    lengths_text,
    loaded,
    model_line,
    plan_text,
)
from sft_core.text.example import Example
from sft_core.text.prompts import prompt_ids


def eval_plan(config: EvalConfig, source: Source, heldout: Sequence[Example]) -> str:
    """What an evaluation of these problems would do."""
    with loaded(config, source) as (policy, _):
        trusted_sampler(policy)
        prompts = [len(prompt_ids(policy.tokenizer, example, config)) for example in heldout]
        weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
        lines = {
            "task": f"{config.task}: {len(heldout):,} problems; {config.prompt_format} answers, {config.shots} shots",
            "first": first_line(policy, heldout, config),
            "model": model_line(config, policy).rpartition(", ")[0] + f"; {policy.precision.name} on {policy.device}",
            "tokens": f"prompts {lengths_text(prompts, config.max_prompt_tokens)}; answers of "
            f"{config.max_completion_tokens} at most, {answers_text(config.samples)}, {config.batch_size} at once",
            "memory": f"{weights / GB:.2f} GB of weights, and the keys and values of a batch",
            "folder": folder_line(config, "eval"),
        }
    return plan_text(lines)

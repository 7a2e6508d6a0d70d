"""--dry_run of GRPO; what it is: sft_core/run/plan_lines.py."""

from __future__ import annotations

from dataclasses import replace

from eval.trust import trusted
from grpo_core.forecast.hours import hours_line
from grpo_core.forecast.memory import fitted
from grpo_core.job import GRPOJob
from grpo_core.recipes import objective_line
from grpo_core.scoring import unearned
from grpo_core.warmstart import tiny_sft_folder
from sft_core.learn.footprint import Lengths
from sft_core.learn.recovery import size_text
from sft_core.model.source import find_source
from sft_core.run.plan_lines import (
    answers_text,
    evaluations_at,
    first_line,
    folder_line,
    lengths_text,
    loaded,
    mean,
    model_line,
    passes,
    plan_text,
    prompt_lengths,
    rate_text,
    some,
    steps_text,
    task_line,
)


def grpo_plan(job: GRPOJob) -> str:
    """What `job` would do."""
    config, task, steps = job.config, job.task, job.steps
    name, built_in = config.model, None
    if not job.source:
        start = tiny_sft_folder(config)
        there = (start / "final").is_dir()
        built_in = find_source(replace(config, model=str(start / "final"))) if there else None
        name = f"the built-in one, after its SFT ({'done, ' if there else 'to be done first, '}{start})"
    B, G, T = config.prompts_per_step, config.group_size, config.max_completion_tokens
    with loaded(config, job.source, built_in) as (policy, source):
        trusted(policy)
        fit = fitted(config, source)
        prompts = prompt_lengths(policy, task, config)
        expected = Lengths(round(mean(prompts)), T)
        looks = evaluations_at(config.eval_every, steps, first=True) if task.heldout else []
        rewards = (f"{reward.weight:g} x {reward.name}" for reward in job.rewards)
        updates = f", {config.mu} updates each" if config.mu > 1 else ""
        lines = {
            "task": task_line(task, config),
            "first": first_line(policy, some(task), config),
            "model": model_line(config, policy, name),
            "rewards": "; ".join([" + ".join(rewards), *unearned(job.rewards, task.train[0], config)]),
            "objective": objective_line(config),
            "steps": f"{steps:,} of {B} prompts x {G} completions{passes(task, B, steps)}{updates}, "
            f"{size_text(fit.micro_batch, B * G)} at a time; {rate_text(config, steps)}; beta {config.beta:g}",
            "tokens": f"prompts {lengths_text(prompts, config.max_prompt_tokens)}; completions of {T} at most: up to "
            f"{B * G * T:,} a step, {steps * B * G * T:,} in all",
            "evaluations": f"of {len(task.heldout)} held-out problems, {answers_text(config.eval_samples)}, "
            f"{steps_text(looks)}",
            "time": hours_line(config, source, expected, steps, len(looks)),
            "memory": fit.line.removeprefix("memory: ") + f", on {policy.device}",
            "folder": folder_line(config, "grpo", steps),
        }
    return plan_text(lines)

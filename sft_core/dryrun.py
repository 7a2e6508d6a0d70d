"""--dry_run of SFT; what it is: sft_core/run/plan_lines.py."""

from __future__ import annotations

from sft_core.job import SFTJob, plan
from sft_core.learn.fit import fitted
from sft_core.learn.recovery import size_text
from sft_core.learn.trust import trusted_learner
from sft_core.run.plan_lines import (
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
from sft_core.text.prompts import FORMATS, demonstration, encode_completion, is_terse


def sft_plan(job: SFTJob) -> str:
    """What `job` would do."""
    config, task, steps = job.config, job.task, job.steps
    with loaded(config, job.source) as (policy, source):
        trusted_learner(policy)
        fit = fitted(config, source, plan)
        prompts = prompt_lengths(policy, task, config)
        fmt, eos = FORMATS[config.prompt_format], policy.eos_ids[0]
        texts = [demonstration(e, fmt, is_terse(e, config.worked_share)) for e in some(task)]
        wanted = [len(encode_completion(policy.tokenizer, text, eos)) for text in texts]
        taught = [min(length, config.max_completion_tokens) for length in wanted]
        a_step = config.batch_size * (mean(prompts) + mean(taught))
        looks = evaluations_at(config.eval_every, steps, first=False) if task.heldout else []
        lines = {
            "task": task_line(task, config),
            "first": first_line(policy, some(task), config),
            "model": model_line(config, policy),
            "steps": f"{steps:,} of {config.batch_size} demonstrations{passes(task, config.batch_size, steps)}, "
            f"{size_text(fit.micro_batch, config.batch_size)} at a time; {rate_text(config, steps)}",
            "tokens": f"prompts {lengths_text(prompts, config.max_prompt_tokens)}; demonstrations "
            f"{lengths_text(wanted, config.max_completion_tokens)}; about {a_step:,.0f} a step, "
            f"{steps * a_step:,.0f} in all",
            "evaluations": f"the loss on {len(task.heldout)} held-out problems, {steps_text(looks)}",
            "memory": fit.line.removeprefix("memory: ") + f", on {policy.device}",
            "folder": folder_line(config, "sft", job.steps),
        }
    return plan_text(lines)

"""--dry_run of SFT; what it is: sft_core/run/told.py."""

from __future__ import annotations

from sft_core.job import SFTJob
from sft_core.learn.trust import trusted_learner
from sft_core.run.told import (
    evaluations_at,
    loaded,
    mean,
    passes,
    prompt_lengths,
    some,
    told,
    told_folder,
    told_lengths,
    told_memory,
    told_model,
    told_rate,
    told_steps,
    told_task,
)
from sft_core.text.prompts import FORMATS, demonstration, encode_completion, is_terse


def sft_plan(job: SFTJob) -> str:
    """What `job` would do."""
    config, task, steps = job.config, job.task, job.steps
    with loaded(config, job.source) as (policy, _):
        trusted_learner(policy)
        prompts = prompt_lengths(policy, task, config)
        fmt, eos = FORMATS[config.prompt_format], policy.eos_ids[0]
        texts = [demonstration(e, fmt, is_terse(e, config.worked_share)) for e in some(task)]
        wanted = [len(encode_completion(policy.tokenizer, text, eos)) for text in texts]
        taught = [min(length, config.max_completion_tokens) for length in wanted]
        a_step = config.batch_size * (mean(prompts) + mean(taught))
        looks = evaluations_at(config.eval_every, steps, first=False) if task.heldout else []
        lines = {
            "task": told_task(task, config),
            "model": told_model(config, policy),
            "steps": f"{steps:,} of {config.batch_size} demonstrations{passes(task, config.batch_size, steps)}, "
            f"{min(config.micro_batch, config.batch_size)} rows at a time; {told_rate(config, steps)}",
            "tokens": f"prompts {told_lengths(prompts, config.max_prompt_tokens)}; demonstrations "
            f"{told_lengths(wanted, config.max_completion_tokens)}; about {a_step:,.0f} a step, "
            f"{steps * a_step:,.0f} in all",
            "evaluations": f"the loss on {len(task.heldout)} held-out problems, {told_steps(looks)}",
            "memory": told_memory(policy),
            "folder": told_folder(config, "sft", job.steps),
        }
    return told(lines)

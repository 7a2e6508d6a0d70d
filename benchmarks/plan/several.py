"""1 to 64 GPUs of a kind: what each must hold, how long a step takes at least, and how much of it is exchange."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.plan.question import Question
from grpo_core.forecast.memory import batches_of
from grpo_core.forecast.roofline import phases
from grpo_core.forecast.traffic import IN_A_MACHINE, sent
from rewards.tables import markdown
from sft_core.learn.footprint import GB

COUNTS = (1, 2, 4, 8, 16, 32, 64)


def several(question: Question, network: float) -> str:
    """A line for each number of GPUs, as Markdown; `network`: bytes a second between machines.

    Raises:
        ValueError: nothing is known of how its GPUs are connected.
    """
    where, prompts = question.where, question.config.prompts_per_step
    if not where.link:
        raise ValueError(f"--gpus: how {where.name} is connected to others is not known here; name a --gpu")
    rows = [["GPUs", *(f"{way}: {what}" for way in ("ddp", "fsdp") for what in ("GB each", "a step, s", "exchange"))]]
    for count in COUNTS:
        rows.append([str(count), *(cell for way in ("ddp", "fsdp") for cell in _cells(question, way, count, network))])
    told = [
        f"{where.name}, {question.precision}: each has {where.memory / GB:.1f} GB; *: does not fit, or barely.",
        markdown(rows),
        f"Least times of a step of {prompts} prompts, by arithmetic, memory traffic and exchange one after the other, "
        f"for completions that use up their budget; {where.link / GB:.3g} GB/s between GPUs, {network / GB:.3g} GB/s "
        f"between machines of {IN_A_MACHINE}. All of it is computed, nothing measured.",
    ]
    if prompts < COUNTS[-1]:
        told.append(f"With more GPUs than prompts some sample nothing: --prompts_per_step is {prompts}.")
    return "\n\n".join(told)


def _cells(question: Question, way: str, count: int, network: float) -> list[str]:
    config = replace(question.config, parallel=way)
    each = replace(question, config=config, ranks=count)
    compute, exchange = seconds(replace(question, config=config), count, network)
    return [
        f"{each.plan.peak / GB:.1f}{'' if each.fits else ' *'}",
        f"{compute + exchange:.3g}",
        _share(exchange, compute),
    ]


def seconds(question: Question, count: int, network: float) -> tuple[float, float]:
    """The least time of a rank's part of a step, and of what it exchanges."""
    config = replace(question.config, prompts_per_step=-(-question.config.prompts_per_step // count))
    found = phases(config, question.shapes, question.half, question.lengths)
    ceilings = question.where.ceilings(question.dtype)
    compute = sum(phase.seconds(ceilings) for phase in found.values())
    link = question.where.link if count <= IN_A_MACHINE else min(question.where.link, network)
    batches = batches_of(config, question.shapes, question.lengths)
    return compute, sent(config, question.shapes, batches, count) / link


def _share(exchange: float, compute: float) -> str:
    return f"{exchange / (exchange + compute):.0%}"

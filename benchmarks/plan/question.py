"""A configuration on a machine: the memory that it needs, its least step time, and which flags save memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.plan.sizes import known_shape
from grpo_core.config import GRPOConfig
from grpo_core.forecast.hours import RECORDED, Hours, duration, least_hours
from grpo_core.forecast.machine import GPUS, Machine, machine
from grpo_core.forecast.memory import plan
from grpo_core.forecast.roofline import phases
from rewards.tables import markdown
from sft_core.learn.fit import fit
from sft_core.learn.footprint import GB, Lengths, Plan
from sft_core.model.shapes import Shapes, shapes_of
from sft_core.model.source import Source, find_source
from sft_core.run.plan_lines import evaluations_at

GSM8K = 7473  # training problems
SMALLEST_SAVING = 0.05 * GB  # smaller savings are not worth a flag


@dataclass(frozen=True)
class Question:
    """A configuration on a machine, with the lengths that are planned for (None: the longest that it admits)."""

    config: GRPOConfig
    source: Source | None
    where: Machine
    lengths: Lengths
    ranks: int = 1  # a GPU each; the configuration is that of all of them

    @property
    def shapes(self) -> Shapes:
        return shapes_of(self.config, self.source)

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products on that machine: what `--precision auto` would pick there."""
        return self.where.dtype(self.config.precision)

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def fits(self) -> bool:
        """A GPU's allocator loses some to fragments, which the forecast leaves out."""
        return self.plan.peak <= 0.95 * self.where.memory

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32

    @property
    def plan(self) -> Plan:
        """Under --micro_batch auto with what it would choose there."""
        shapes, found = self.shapes, self.where
        chosen = fit(
            self.config,
            found.kind,
            found.memory,
            lambda config, size: plan(config, shapes, self.half, found.kind, self.lengths, size, self.ranks),
        )
        assert chosen.plan
        return chosen.plan


def answer(question: Question) -> str:
    """The whole answer, as Markdown."""
    forecast, where = question.plan, question.where
    fits = "fits" if question.fits else "does NOT fit, or barely"
    lengths = f"prompts of {question.lengths.prompt} tokens, completions of {question.lengths.completion}"
    parts = [
        f"{where.name}, {question.precision}, {lengths}",
        f"Peak memory {forecast.peak / GB:.2f} GB of {where.memory / GB:.2f} GB, in {forecast.worst}: it {fits}.",
        markdown([["held at the peak", "GB"], *([name, f"{size / GB:.2f}"] for name, size in forecast.items.items())]),
        markdown([["moment", "GB"], *([name, f"{size / GB:.2f}"] for name, size in by_moment(forecast))]),
        "At least, by arithmetic and memory traffic alone:",
        markdown(time_table(question)),
        f"The whole run: {hours_of(question)}." if steps_of(question.config) else "The whole run: give --max_steps.",
    ]
    saved = [[flags, f"{size / GB:.2f}", f"{left / GB:.2f}"] for flags, size, left in savings(question)]
    if saved:
        parts += ["What a flag would save:", markdown([["flag", "GB less", "peak then"], *saved])]
    return "\n\n".join(parts)


def by_moment(forecast: Plan) -> list[tuple[str, float]]:
    """The moments' sums in bytes, the largest first."""
    sums = [(name, sum(items.values())) for name, items in forecast.moments.items()]
    return sorted(sums, key=lambda pair: -pair[1])


def time_table(question: Question) -> list[list[str]]:
    """Seconds by phase and what each waits for."""
    ceilings = question.where.ceilings(question.dtype)
    found = phases(question.config, question.shapes, question.half, question.lengths)
    rows = [["phase", "seconds", "Tflop", "GB moved", "waits for"]]
    for name, phase in found.items():
        numbers = [f"{phase.seconds(ceilings):.3f}", f"{phase.flops / 1e12:.3f}", f"{phase.bytes / GB:.1f}"]
        rows.append([name, *numbers, phase.bound(ceilings)])
    total = sum(phase.seconds(ceilings) for phase in found.values())
    return [*rows, ["a step", f"{total:.3f}", "", "", ""]]


def savings(question: Question) -> list[tuple[str, float, float]]:
    """Flags that make the peak smaller: the flag, the bytes it saves by itself, the peak with it; the most first."""
    peak, found = question.plan.peak, []
    for flags, changed in alternatives(question.config, question.where.kind):
        left = replace(question, config=changed).plan.peak
        if peak - left >= SMALLEST_SAVING:
            found.append((flags, peak - left, left))
    return sorted(found, key=lambda each: each[2])


def alternatives(config: GRPOConfig, kind: str) -> Iterator[tuple[str, GRPOConfig]]:
    """The same run with one flag changed. All but --lora and --beta 0 leave what is learned as it is."""
    changes: list[tuple[str, dict[str, Any]]] = [
        ("--gradient_checkpointing", {"gradient_checkpointing": True}),
        ("--offload_optimizer cpu", {"offload_optimizer": "cpu"})
        if kind != "cpu"
        else ("--offload_optimizer FOLDER", {"offload_optimizer": "."}),
        ("--beta 0", {"beta": 0.0, "ref_sync_every": 0, "kl_correction": False}),
        ("--share_prompts", {"share_prompts": True}),
    ]
    if kind == "cuda" and config.decoding != "segments":
        changes.append(("--decoding segments", {"decoding": "segments"}))
    changes += [(f"--micro_batch {n}", {"micro_batch": n}) for n in sorted({config.micro_batch // 2, 1} - {0})]
    changes += [(f"--logit_chunk {n}", {"logit_chunk": n}) for n in (2**26, 2**24) if not 0 < config.logit_chunk <= n]
    if config.eval_problems:
        asked = -(-config.eval_batch_size // 4)
        changes.append((f"--eval_batch_size {asked}", {"eval_batch_size": asked}))
    if not config.adapter_path:
        changes.append(("--lora", {"lora": True}))
    for flags, values in changes:
        if any(getattr(config, name) != value for name, value in values.items()):
            yield flags, replace(config, **values)


def steps_of(config: GRPOConfig) -> int:
    """Of the whole run, as far as it is known without the data: GSM8K has 7,473 training problems. 0: unknown."""
    problems = config.max_samples or (GSM8K if config.task == "gsm8k" else 0)
    return config.max_steps or math.ceil(config.epochs * problems / config.prompts_per_step)


def hours_of(question: Question) -> Hours:
    """The least time of the whole run."""
    config, where = question.config, question.where
    steps = steps_of(config)
    looks = len(evaluations_at(config.eval_every, steps, first=True))
    ceilings = where.ceilings(question.dtype)
    return least_hours(
        config, question.shapes, question.half, question.lengths, ceilings, steps, looks, config.eval_problems
    )


def every_gpu(config: GRPOConfig, prompt_tokens: int, completion_tokens: int) -> str:
    """A line for each GPU that is known here, as Markdown: does it fit, how long will it take at least?"""
    rows = [["GPU", "precision", "memory", "peak", "fits", "a step, s", "the whole run"]]
    for name in GPUS:
        question = question_of(config, name, prompt_tokens, completion_tokens)
        hours, where = hours_of(question), question.where
        fits = "yes" if question.fits else "NO, or barely"
        sizes = [f"{where.memory / GB:.1f} GB", f"{question.plan.peak / GB:.1f} GB", fits]
        whole = duration(hours.total) if hours.steps else "unknown: --max_steps"
        rows.append([where.name, question.precision, *sizes, f"{hours.step:.3g}", whole])
    least = "The least times, by arithmetic and memory traffic alone, for completions that use up their budget"
    return f"{markdown(rows)}\n\n{least}; {RECORDED}."


def question_of(config: GRPOConfig, gpu: str, prompt_tokens: int, completion_tokens: int) -> Question:
    """Raises:
    ValueError: as `machine` and `find_source`; a length below 0.
    """
    where = machine(gpu)
    for flag, value in (("prompt_tokens", prompt_tokens), ("completion_tokens", completion_tokens)):
        if value < 0:
            raise ValueError(f"--{flag} {value}: expected 1 or more, or 0 for the longest that the config admits")
    lengths = Lengths(prompt_tokens or config.max_prompt_tokens, completion_tokens or config.max_completion_tokens)
    source = None if config.model == "tiny" else known_shape(config.model) or find_source(config)
    return Question(config, source, where, lengths)

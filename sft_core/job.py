"""Supervised fine-tuning before it begins: what can be set, and what is refused before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sft_core.config import ModelConfig, OptimConfig, RunConfig, flag
from sft_core.errors import require
from sft_core.learn.footprint import Lengths, Plan, learner_moments, micro_batches, of_a_rank, standing
from sft_core.learn.rows import Tokens
from sft_core.model.policy import load_tokenizer
from sft_core.model.shapes import Shapes
from sft_core.model.source import Source, check_context, find_source
from sft_core.run.hub import check_run_push
from sft_core.text.config import TaskConfig
from sft_core.text.prompts import drop_long_prompts
from sft_core.text.tasks import Task, load_task


@dataclass(frozen=True)
class SFTConfig(RunConfig, OptimConfig, ModelConfig, TaskConfig):
    """Supervised fine-tuning."""

    batch_size: int = flag(16, "demonstrations per optimizer step, --micro_batch of them at a time")
    max_completion_tokens: int = flag(512, "longer demonstrations are cut off, and then do not teach the model to stop")
    worked_share: float = flag(1.0, "share of demonstrations with worked steps; the others only state the answer")
    slips: float = flag(0.0, "arithmetic: share of the worked lines whose result is one too large (a careless teacher)")

    def check(self) -> None:
        for part in (TaskConfig, ModelConfig, OptimConfig, RunConfig):
            part.check(self)
        require(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")
        require(self.max_completion_tokens >= 1, "max_completion_tokens", self.max_completion_tokens, "1 or more")
        require(0 <= self.worked_share <= 1, "worked_share", self.worked_share, "0 to 1")
        require(0 <= self.slips <= 1, "slips", self.slips, "0 to 1")
        require(not self.slips or self.task == "arithmetic", "slips", self.slips, "0, unless --task is arithmetic")
        require(
            not self.endless or self.max_steps > 0,
            "max_steps",
            self.max_steps,
            f"more than 0: the {self.task} task has no end",
        )


def plan(config: SFTConfig, shapes: Shapes, half: bool, kind: str, micro_batch: int | Tokens, ranks: int = 1) -> Plan:
    """The memory of a step on the longest rows that the config admits; `half`: under autocast; `kind`: cpu or cuda;
    `ranks`: how many share its rows."""
    lengths = Lengths(config.max_prompt_tokens, config.max_completion_tokens)
    batches = micro_batches(
        -(-config.batch_size // ranks), 1, lengths, config.share_prompts and shapes.packs, micro_batch
    )
    always = standing(config, shapes, half, kind, batches)
    moments = learner_moments(config, shapes, half, kind, batches, always, entropy=False)
    return Plan(of_a_rank(config, shapes, moments, ranks))


@dataclass(frozen=True)
class SFTJob:
    """A checked configuration: everything that a user can get wrong has been looked at, no weight has been read."""

    config: SFTConfig
    task: Task
    source: Source | None  # None: the built-in model

    @property
    def steps(self) -> int:
        """How many steps the run takes."""
        config = self.config
        return config.max_steps or math.ceil(config.epochs * (self.task.size or 0) / config.batch_size)


def prepare(config: SFTConfig) -> SFTJob:
    """Read the task and the model's configuration, and refuse what cannot work.

    Raises:
        ValueError: as `load_task`, `find_source` and `check_push`; a sequence budget over the model's context.
    """
    source = None if config.model == "tiny" else find_source(config)
    check_context(source, config.max_prompt_tokens, config.max_completion_tokens)
    check_run_push(config, source, config.lora)
    task, tokenizer = load_task(config, config.seed), load_tokenizer(source)
    task = task.filtered(lambda examples: drop_long_prompts(examples, tokenizer, config))
    return SFTJob(config, task, source)

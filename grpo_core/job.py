"""A GRPO run before it begins: everything that a user can get wrong is checked, before any weight is read."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import set_seed

from eval.trust import trusted
from grpo_core.config import GRPOConfig
from grpo_core.dynamic import Draw, replacing_equal_groups
from grpo_core.reference import policy_and_reference
from grpo_core.scoring import REWARD_COLUMNS
from grpo_core.step import Learner, sample_and_score, sample_groups
from grpo_core.vllm_sampler import VLLMSampler
from rewards import Reward, check_signatures, load_rewards
from sft_core.learn.optim import Optimizer
from sft_core.learn.rows import Tokens
from sft_core.model.policy import load_policy, load_tokenizer
from sft_core.model.source import Source, check_context, find_source
from sft_core.run.hub import check_run_push
from sft_core.run.randomness import deterministic
from sft_core.text.prompts import drop_long_prompts
from sft_core.text.tasks import Task, load_task


@dataclass(frozen=True)
class GRPOJob:
    """A checked configuration."""

    config: GRPOConfig
    task: Task
    rewards: list[Reward]
    source: Source | None  # None: the built-in model

    @property
    def steps(self) -> int:
        """How many steps the run takes."""
        config = self.config
        return config.max_steps or math.ceil(config.epochs * (self.task.size or 0) / config.prompts_per_step)

    def learner(self, source: Source, more: Draw, micro_batch: int | Tokens) -> Learner:
        """Seed, load the policy, and copy the reference from it. `more` draws further prompts."""
        config = self.config
        deterministic(config.deterministic)
        set_seed(config.seed)
        policy, reference = policy_and_reference(trusted(load_policy(config, source)), config)
        optimizer = Optimizer(policy, config, self.steps * config.mu, micro_batch)
        roll_out = replacing_equal_groups(more) if config.dynamic_sampling else sample_and_score
        sampler = VLLMSampler(policy, config) if config.vllm else sample_groups
        return Learner(config, policy, reference, self.rewards, optimizer, sampler, roll_out)


def prepare(config: GRPOConfig) -> GRPOJob:
    """Read the rewards, the task and the model's configuration, and refuse what cannot work.

    Raises:
        ValueError: as `load_rewards`, `load_task`, `find_source`, `check_context` and `check_push`.
    """
    rewards = load_rewards(config.rewards, config.reward_weights)
    source = None if config.model == "tiny" else find_source(config)
    check_context(source, config.max_prompt_tokens, config.max_completion_tokens)
    check_run_push(config, source, config.lora)
    task, tokenizer = load_task(config, config.seed), load_tokenizer(source)
    check_signatures(rewards, [*REWARD_COLUMNS, "trainer_state", *task.columns])
    task = task.filtered(lambda examples: drop_long_prompts(examples, tokenizer, config))
    return GRPOJob(config, task, rewards, source)

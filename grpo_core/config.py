"""GRPO on a language model: sample groups of answers, reward them, learn from the better ones.

Without a --model, --task, --config or --preset it trains the built-in model on arithmetic word problems, on any CPU,
in minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eval.sampling import Sampling
from sft_core.config import ModelConfig, OptimConfig, RunConfig, TaskConfig, flag, require


@dataclass(frozen=True)
class GRPOConfig(RunConfig, OptimConfig, ModelConfig, TaskConfig):
    """A GRPO run. A step samples `prompts_per_step` x `group_size` completions and learns them in micro-batches."""

    prompts_per_step: int = flag(4, "B: prompts in a step (4 x 8 completions: what a T4 samples at once)")
    group_size: int = flag(8, "G: completions sampled for each prompt (8: TRL; DeepSeekMath sampled 64)")
    max_completion_tokens: int = flag(
        256, "completion budget in tokens (256: most GSM8K solutions fit, and so does a T4)"
    )
    temperature: float = flag(1.0, "sampling temperature, for the learner's log-probabilities too (1: TRL)")
    top_k: int = flag(0, "sample among so many likeliest tokens; 0: all (the learner scores the uncut distribution)")
    top_p: float = flag(1.0, "sample among the likeliest tokens of this total probability; 1: all")
    min_p: float = flag(0.0, "sample among tokens of at least this share of the likeliest one's probability; 0: all")
    rewards: list[str] = flag(["correctness_reward_func"], "reward functions by name, or my_module:my_reward")
    reward_weights: list[float] = flag([], "a weight for each reward function; none: all 1")
    scale_rewards: Literal["group", "batch", "none"] = flag(
        "group", "advantages are divided by the group's spread, the batch's, or nothing (Dr. GRPO)"
    )
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = flag(
        "token_mean", "what a token counts in the loss: DAPO, GRPO or Dr. GRPO (see grpo_core/objective.py)"
    )
    beta: float = flag(0.0, "weight of the KL to the frozen reference (DeepSeekMath: 0.04); 0: none is held (TRL)")
    epsilon_low: float = flag(0.2, "the ratio is clipped at 1 - this (PPO)")
    epsilon_high: float = flag(0.2, "the ratio is clipped at 1 + this (PPO; DAPO uses 0.28)")
    mu: int = flag(1, "optimizer steps on each batch of samples (1: DeepSeekMath, TRL)")
    shuffle_rewards: bool = flag(False, "control experiment: deal the step's rewards out to its rows at random")
    eval_batch_size: int = flag(64, "held-out problems asked at once")
    show_every: int = flag(10, "steps between printed samples (question, expected, response, extracted); 0: never")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_completion_tokens, self.temperature, self.top_k, self.top_p, self.min_p)

    def check(self) -> None:
        for part in (TaskConfig, ModelConfig, OptimConfig, RunConfig):
            part.check(self)
        for name in ("prompts_per_step", "max_completion_tokens", "mu", "eval_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        require(
            self.group_size >= 2,
            "group_size",
            self.group_size,
            "2 or more: a completion is judged against the others of its group",
        )
        require(
            self.temperature > 0, "temperature", self.temperature, "more than 0: a group of greedy answers is all alike"
        )
        require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, up to 1")
        require(0 <= self.min_p < 1, "min_p", self.min_p, "0 or more and below 1")
        require(0 <= self.epsilon_low <= 1, "epsilon_low", self.epsilon_low, "0 to 1")
        for name in ("top_k", "beta", "epsilon_high", "show_every"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(
            self.task != "arithmetic" or self.max_steps > 0,
            "max_steps",
            self.max_steps,
            "more than 0: the arithmetic task has no end",
        )

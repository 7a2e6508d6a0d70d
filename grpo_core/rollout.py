"""The first half of a step: completions for a batch of prompts, and what the reward functions say of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eval.sampling import Samples, sample
from grpo_core.advantages import zero_spread
from grpo_core.config import GRPOConfig
from rewards import Reward, Scores, score
from sft_core.clock import Stopwatch
from sft_core.policy import Policy
from sft_core.prompts import encode_prompt, prompt_messages
from sft_core.tasks import Example

if TYPE_CHECKING:
    from grpo_core.step import Learner

# What reward functions get, by these names: the first three are of an `Example`, the others of the completion's budget.
REWARD_COLUMNS = ("question", "answer", "solution", "completion_ids", "max_completion_tokens", "overlong_buffer")

Draw = Callable[[int], Sequence[Example]]  # so many further examples of the task


@dataclass(frozen=True)
class Rollout:
    """B groups of G completions; group b is rows b * G .. b * G + G - 1 of `samples` and of `scores`."""

    examples: Sequence[Example]
    samples: Samples
    scores: Scores
    reward_BG: Tensor  # float64, on the CPU: the weighted sums of `scores`
    replaced: int = 0  # groups that were sampled and thrown away

    @property
    def value_KBG(self) -> Tensor:
        """Each of K reward functions' values before its weight; NaN: no opinion. float64, on the CPU."""
        values = [
            [torch.nan if value is None else value for value in of_function]
            for of_function in self.scores.by_function.values()
        ]
        return torch.tensor(values, dtype=torch.float64).view(-1, *self.reward_BG.shape)

    def equal_groups(self, config: GRPOConfig) -> Tensor:
        """True for the groups that teach nothing: those of equal rewards, or, where each reward function is normalised
        by itself, those on which every function is of one opinion."""
        if config.reward_aggregation == "sum_then_normalize":
            return zero_spread(self.reward_BG)
        return torch.stack([zero_spread(value_BG) for value_BG in self.value_KBG]).all(dim=0)


def sample_groups(policy: Policy, examples: Sequence[Example], config: GRPOConfig) -> Samples:
    """G completions for each example, side by side: rows b * G .. b * G + G - 1 belong to example b."""
    prompts = [encode_prompt(policy.tokenizer, prompt_messages(example, config)) for example in examples]
    return sample(policy, [prompt for prompt in prompts for _ in range(config.group_size)], config.sampling)


def score_groups(
    rewards: list[Reward], samples: Samples, examples: Sequence[Example], config: GRPOConfig
) -> tuple[Scores, Tensor]:
    """Every reward function's values, and their weighted sums as reward_BG (float64, on the CPU)."""
    repeated = [example for example in examples for _ in range(config.group_size)]
    N, budget = len(repeated), config.max_completion_tokens
    columns: dict[str, list[Any]] = {
        "question": [example.question for example in repeated],
        "answer": [example.answer for example in repeated],
        "solution": [example.solution for example in repeated],
        "completion_ids": samples.rows.completion_ids(),
        "max_completion_tokens": [budget] * N,
        "overlong_buffer": [config.overlong_buffer or max(1, budget // 5)] * N,
    }
    scores = score(rewards, columns["question"], samples.texts, columns, config.reward_timeout)
    if config.shuffle_rewards:
        scores = scores.reordered(torch.randperm(N).tolist())
    return scores, torch.tensor(scores.total, dtype=torch.float64).view(len(examples), config.group_size)


def sample_and_score(learner: Learner, examples: Sequence[Example], clock: Stopwatch) -> Rollout:
    """The rollout of these examples."""
    samples = learner.sampler(learner.policy, examples, learner.config)
    clock.lap("generation")
    scores, reward_BG = score_groups(learner.rewards, samples, examples, learner.config)
    clock.lap("reward")
    return Rollout(examples, samples, scores, reward_BG)


def replace_equal_groups(rollout: Rollout, learner: Learner, more: Draw, clock: Stopwatch) -> Rollout:
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), bounded: groups of equal rewards teach nothing and are
    replaced by groups of further prompts, up to `dynamic_sampling` times. Those equal even then stay in the batch."""
    for _ in range(learner.config.dynamic_sampling):
        equal_B = rollout.equal_groups(learner.config)
        if not equal_B.any():
            break
        rollout = _substituted(rollout, equal_B, sample_and_score(learner, more(int(equal_B.sum())), clock))
    return rollout


def _substituted(rollout: Rollout, equal_B: Tensor, fresh: Rollout) -> Rollout:
    """The rollout with each group of `equal_B` replaced by the next one of `fresh`."""
    B, G = rollout.reward_BG.shape
    source_B = torch.arange(B)  # where group b of the result is among the old groups followed by the fresh ones
    source_B[equal_B] = B + torch.arange(int(equal_B.sum()))
    rows = [group * G + i for group in source_B.tolist() for i in range(G)]
    examples = [*rollout.examples, *fresh.examples]
    return Rollout(
        [examples[group] for group in source_B.tolist()],
        rollout.samples.followed_by(fresh.samples, rows),
        rollout.scores.followed_by(fresh.scores).reordered(rows),
        torch.cat([rollout.reward_BG, fresh.reward_BG])[source_B],
        rollout.replaced + int(equal_B.sum()),
    )

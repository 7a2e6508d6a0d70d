"""Rewards of a step's completions: the reward functions called as TRL calls them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from eval.samples import Samples
from grpo_core.config import GRPOConfig
from rewards import REWARDS, Reward, Scores, TrainerState, score
from sft_core.learn import ranks
from sft_core.run.randomness import same_random_state
from sft_core.text.example import Example
from sft_core.text.prompts import FORMATS, demonstration, prompt_messages

LENGTH = "soft_overlong_reward_func"  # which looks at no format
FIELDS = ("question", "answer", "solution")
# What reward functions receive whatever the data: fields of an `Example`, the sampled ids, two sizes of the budget.
# The data's own columns come on top, under their names.
REWARD_COLUMNS = (*FIELDS, "completion_ids", "max_completion_tokens", "overlong_buffer")


def score_groups(
    rewards: list[Reward],
    samples: Samples,
    examples: Sequence[Example],
    config: GRPOConfig,
    state: TrainerState | None = None,
) -> tuple[Scores, Tensor]:
    """Every reward function's values, and their weighted sums as reward_BG (float64, on the CPU). Under torchrun each
    rank calls them for its share of the groups, and all get all values."""
    repeated = [example for example in examples for _ in range(config.group_size)]
    N, budget = len(repeated), config.max_completion_tokens
    names = sorted({name for example in examples for name in example.columns})
    columns: dict[str, list[Any]] = {
        **{name: [getattr(example, name) for example in repeated] for name in FIELDS},
        **{name: [example.columns.get(name) for example in repeated] for name in names},
        "completion_ids": samples.rows.completion_ids(),
        "max_completion_tokens": [budget] * N,
        "overlong_buffer": [config.overlong_buffer or max(1, budget // 5)] * N,
    }
    prompts: list[Any] = [example.question for example in repeated]
    completions: list[Any] = samples.texts
    if config.reward_format == "chat":
        prompts = [prompt_messages(example, config) for example in repeated]
        completions = [[{"role": "assistant", "content": text}] for text in samples.texts]
    own = ranks.share(len(examples))
    at = slice(own.start * config.group_size, own.stop * config.group_size)
    mine = {name: column[at] for name, column in columns.items()}
    found = score(rewards, prompts[at], completions[at], mine, config.reward_timeout, state, at.start, N)
    scores = reduce(Scores.followed_by, ranks.gathered(found, "rewards"))
    same_random_state()  # whatever each rank's functions have drawn
    if config.shuffle_rewards:
        scores = scores.reordered(torch.randperm(N).tolist())
    return scores, torch.tensor(scores.total, dtype=torch.float64).view(len(examples), config.group_size)


def unearned(rewards: Sequence[Reward], example: Example, config: GRPOConfig) -> list[str]:
    """A line for each reward of this project that pays nothing for the problem's own solution in the prompt's format,
    because it looks for another one."""
    if not example.answer:
        return []
    text = demonstration(example, FORMATS[config.prompt_format])
    columns = {name: [getattr(example, name)] for name in FIELDS}
    own = [reward for reward in rewards if REWARDS.get(reward.name) is reward.function and reward.name != LENGTH]
    return [
        f"{reward.name} pays nothing for the first problem's own solution in --prompt_format {config.prompt_format}: "
        "it looks for another format"
        for reward in own
        if not reward.function([example.question], [text], **columns)[0]
    ]

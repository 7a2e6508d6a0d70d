"""Rewards within a step: each row its own, and what equal or missing ones teach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch

from grpo_core.metrics import step_record
from rewards import Reward
from sft_core.text.prompts import encode_prompt, prompt_messages
from tests.helpers import (
    EXAMPLES,
    PEFT_IS_BEHIND,
    caught,
    completions,
    ends_often,
    gradients,
    grpo_config,
    largest_difference,
    learner,
    step,
    tiny_policy,
    weights,
)
from tests.naive import NaiveStep

pytestmark = pytest.mark.filterwarnings(PEFT_IS_BEHIND)


# --- rewards ---


class Identity:
    """A reward that numbers the rows and keeps what it was called with."""

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], **columns: list[str]) -> list[float]:
        self.called = {"prompts": list(prompts), "completions": list(completions), **columns}
        return [float(row) for row in range(len(prompts))]


def test_every_row_is_scored_against_its_own_prompts_gold() -> None:
    policy, reward = ends_often(tiny_policy()), Identity()
    config = grpo_config()
    report = step(caught(policy, config, reward))
    assert reward.called["answer"] == ["7"] * 3 + ["10"] * 3
    for column in ("prompts", "question"):
        assert reward.called[column] == [EXAMPLES[0].question] * 3 + [EXAMPLES[1].question] * 3
    assert reward.called["solution"] == [EXAMPLES[0].solution] * 3 + [EXAMPLES[1].solution] * 3
    assert reward.called["completions"] == report.rollout.samples.texts
    encoded = [encode_prompt(policy.tokenizer, prompt_messages(example, config)) for example in EXAMPLES]
    assert [prompt for prompt, _ in completions(report.rollout.samples)] == [encoded[0]] * 3 + [encoded[1]] * 3
    for (_, ids), text in zip(completions(report.rollout.samples), report.rollout.samples.texts, strict=True):
        assert policy.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_row_gets_its_own_reward_and_advantage() -> None:
    report = step(caught(ends_often(tiny_policy()), grpo_config(scale_rewards="none"), Identity()))
    assert report.rollout.reward_BG.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert report.advantage_BG.tolist() == [[-1, 0, 1], [-1, 0, 1]]


@pytest.mark.parametrize("row", range(6))
def test_a_rewarded_completion_gains_on_its_group(row: int) -> None:
    """One row is paid: a small step down the gradient lifts its log-probability above the mean of its group, for that
    is the inner product of the step with its own direction."""
    policy = ends_often(tiny_policy(dtype=torch.float64))
    config = grpo_config(scale_rewards="none", aggregation="constant_length")

    def reward(prompts: Sequence[str], **_: Any) -> list[float]:
        return [float(i == row) for i in range(len(prompts))]

    parts = caught(policy, config, reward, lr=1e-3)
    report = step(parts)
    before, after = (
        NaiveStep(model, config, completions(report.rollout.samples), [0.0] * 6).old
        for model in (tiny_policy(dtype=torch.float64).model, policy.model)
    )
    gains = [float(sum(new) - sum(old)) for old, new in zip(before, after, strict=True)]
    first = row // 3 * 3
    assert gains[row] > fmean(gains[first : first + 3])


@pytest.mark.parametrize("value", [0.0, 0.01, 1.0])
def test_equal_rewards_give_zero_gradient(value: float) -> None:
    (gradient,) = gradients(
        ends_often(tiny_policy()), grpo_config(), reward=lambda prompts, **_: [value] * len(prompts)
    )
    assert all((g == 0).all() for g in gradient.values())


def test_equal_rewards_leave_the_weights_alone() -> None:
    policy = ends_often(tiny_policy())
    parts = learner(policy, grpo_config(), lambda prompts, **_: [0.01] * len(prompts))
    before = weights(policy)
    step(parts)
    assert largest_difference(weights(policy), before) == 0


def test_a_row_that_no_reward_function_judged_is_left_out() -> None:
    values = [None, 1.0, 3.0, 0.0, 0.0, 6.0]
    config = grpo_config(scale_rewards="none")
    report = step(caught(ends_often(tiny_policy()), config, lambda **_: values))
    assert report.rollout.reward_BG[0, 0].isnan()
    assert report.advantage_BG.tolist() == [[0, -1, 1], [-2, -2, 4]]
    record = step_record(report)
    assert record["reward_mean"] == 2.0 and record["rewards/reward"] == 2.0


def test_a_step_that_no_reward_function_judged_teaches_nothing_and_can_be_logged() -> None:
    policy, config = ends_often(tiny_policy()), grpo_config()
    parts = caught(policy, config, lambda prompts, **_: [None] * len(prompts))
    report = step(parts)
    (gradient,) = parts.optimizer.gradients  # type: ignore[attr-defined]
    assert all((g == 0).all() for g in gradient.values())
    record = step_record(report)
    assert math.isnan(record["reward_mean"]) and record["rewards/reward"] is None
    assert record["zero_variance_share"] == 1 and math.isnan(record["reward_std"])


def test_weights_of_rewards_are_applied() -> None:
    config = grpo_config(scale_rewards="none")
    parts = caught(ends_often(tiny_policy()), config)
    ones = Reward("ones", lambda prompts, **_: [1.0] * len(prompts), 10.0)
    report = step(replace(parts, rewards=[Reward("identity", Identity(), 2.0), ones]))
    assert report.rollout.reward_BG.tolist() == [[10, 12, 14], [16, 18, 20]]
    assert set(report.rollout.scores.by_function) == {"identity", "ones"}


def test_shuffled_rewards_are_the_same_rewards_on_other_rows() -> None:
    report = step(caught(ends_often(tiny_policy()), grpo_config(shuffle_rewards=True), Identity()))
    dealt = report.rollout.reward_BG.flatten().tolist()
    assert sorted(dealt) == [0, 1, 2, 3, 4, 5] and dealt != sorted(dealt)

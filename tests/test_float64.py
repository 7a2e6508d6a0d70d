"""The whole chain from rewards to gradients, against a second implementation (tests/naive.py), to 1e-12 in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import product
from statistics import fmean
from typing import Any

import pytest
import torch

from eval.samples import Samples
from grpo_core.config import LOSSES
from grpo_core.metrics import Tally
from grpo_core.step import StepReport
from rewards import Reward
from sft_core.model.policy import Policy
from tests import naive
from tests.drawn import of_many_lengths, samples_where
from tests.helpers import (
    FAMILIES,
    Family,
    caught,
    completions,
    ends_often,
    grpo_config,
    largest_difference,
    length_reward,
    step,
    tiny_policy,
    with_samples,
)

EXACT = 1e-12
SIZES = {"group_size": 4, "micro_batch": 3, "mu": 2, "temperature": 0.8, "epsilon_low": 0.03, "epsilon_high": 0.06}
Values = list[list[float | None]]

families = pytest.mark.parametrize("family", FAMILIES)


def policy_of(family: Family) -> Policy:
    return ends_often(tiny_policy(family, torch.float64))


@lru_cache
def samples_of(family: Family) -> Samples:
    """Completions of many lengths, some of them cut off by the budget; sampled once for all tests."""
    return samples_where(of_many_lengths, policy_of(family), grpo_config(**SIZES), seed=3)


def tweaked_lengths(prompts: Sequence[Any], completions: Sequence[str], **_: Any) -> list[float | None]:
    """Rows 0 and 6 are a little below their group's mean: bad tokens, some of which become likelier all the same."""
    return [value - 0.01 * (row % 6 == 0) for row, value in enumerate(length_reward(prompts, completions))]


def agrees(family: Family, values: Values | None = None, **options: Any) -> tuple[naive.NaiveStep, StepReport]:
    """Take one step of two updates twice, and compare advantages, losses and every gradient.

    values: what each of several reward functions gives; default: one, `tweaked_lengths`.
    """
    samples, policy = samples_of(family), policy_of(family)
    values = values or [tweaked_lengths([], samples.texts)]
    reward_weights = [1.0, 0.5, 2.0][: len(values)]
    config = grpo_config(**SIZES, **options, reward_weights=reward_weights)
    # The second update has moved by about as much whatever a token weighs.
    lr = 0.0008 if config.objective.aggregation == "sequence_sum" else 0.006
    model = copy.deepcopy(policy.model)

    rewards = [
        Reward(f"reward {i}", lambda i=i, **_: values[i], weight)  # type: ignore[misc]
        for i, weight in enumerate(reward_weights)
    ]
    parts = replace(with_samples(caught(policy, config, lr=lr), samples), rewards=rewards)
    report = step(parts)
    catcher: Any = parts.optimizer

    advantages = naive.advantages(values, reward_weights, config)
    assert report.advantage_BG.flatten().tolist() == pytest.approx(advantages, rel=0, abs=EXACT)
    rows = [
        (prompt, [] if config.mask_truncated and cut_off else completion)
        for (prompt, completion), cut_off in zip(completions(samples), samples.truncated_N.tolist(), strict=True)
    ]
    expected = naive.NaiveStep(model, config, rows, advantages)
    losses = []
    for update in range(2):
        loss, gradient = expected.loss_and_gradient()
        assert catcher.losses[update] == pytest.approx(loss, rel=0, abs=EXACT)
        assert largest_difference(catcher.gradients[update], gradient) < EXACT
        assert max(float(g.abs().max()) for g in gradient.values()) > 1e-3
        expected.move(gradient, lr)
        losses.append(loss)

    # The second update really was off-policy, and away from the reference.
    assert min(expected.ratios) < 0.99 and max(expected.ratios) > 1.01 and expected.kl > 1e-3
    means, tokens = Tally.of(report).means(), 2 * expected.tokens
    assert means["grpo_loss"] == pytest.approx(fmean(losses), abs=1e-6)
    assert means["entropy"] == pytest.approx(expected.entropy / tokens, rel=1e-5)
    assert means["kl"] == pytest.approx(expected.kl / tokens if config.beta else 0.0, rel=1e-5)
    assert means["clip_ratio_low"] == pytest.approx(expected.clipped_low / len(expected.ratios))
    assert means["clip_ratio_high"] == pytest.approx(expected.clipped_high / len(expected.ratios))
    assert (means["ratio_min"], means["ratio_max"]) == pytest.approx((min(expected.ratios), max(expected.ratios)))
    return expected, report


@families
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_is_its_published_loss_by_the_definition(family: Family, loss: Any, beta: float) -> None:
    expected, _ = agrees(family, loss=loss, beta=beta)
    if expected.token_loss == "clip":
        assert expected.clipped_low and expected.clipped_high  # both bounds were at work


@families
def test_the_second_implementation_knows_the_same_names(family: Family) -> None:
    assert naive.NAMED == LOSSES


LEVELS, TOKEN_LOSSES = ("token", "sequence"), ("clip", "cispo", "sapo", "vespo")
AGGREGATIONS = ("sequence_mean", "token_mean", "constant_length", "sequence_sum")


@pytest.mark.parametrize(("level", "token_loss", "aggregation"), list(product(LEVELS, TOKEN_LOSSES, AGGREGATIONS)))
def test_the_three_choices_of_the_objective_are_independent(level: Any, token_loss: Any, aggregation: Any) -> None:
    agrees("qwen2", ratio_level=level, token_loss=token_loss, aggregation=aggregation, beta=0.1)


OPTIONS: dict[str, dict[str, Any]] = {
    "kl_correction": {"beta": 0.1, "kl_correction": True},
    "kl_correction of a sequence's ratio": {"beta": 0.1, "kl_correction": True, "loss": "gspo"},
    "delta": {"delta": 1.07},
    "off_policy_threshold": {"off_policy_threshold": 0.01},
    "mask_truncated": {"mask_truncated": True},
    "mask_truncated, a completion's mean": {"mask_truncated": True, "loss": "grpo", "beta": 0.1},
    "mask_truncated, a sequence's ratio": {"mask_truncated": True, "loss": "gspo"},
    "entropy_coef": {"entropy_coef": 0.3},
    "top_entropy": {"top_entropy": 0.4},
    "top_entropy with a bonus": {"top_entropy": 0.4, "entropy_coef": 0.3, "beta": 0.1},
    "scale_rewards batch": {"scale_rewards": "batch"},
    "scale_rewards none": {"scale_rewards": "none", "loss": "dr_grpo"},
    "sapo_temperatures": {"loss": "sapo", "sapo_temperature_pos": 1.3, "sapo_temperature_neg": 2.1},
    "vespo's powers": {
        "loss": "vespo",
        "vespo_k_pos": 1.1,
        "vespo_lambda_pos": 2.1,
        "vespo_k_neg": 2.3,
        "vespo_lambda_neg": 0.7,
    },
    "all at once": {
        "beta": 0.1,
        "kl_correction": True,
        "delta": 1.07,
        "off_policy_threshold": 0.1,
        "mask_truncated": True,
        "entropy_coef": 0.3,
        "top_entropy": 0.6,
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_its_definition_and_changes_the_step(name: str) -> None:
    changed = []
    for family in FAMILIES:
        _, report = agrees(family, **OPTIONS[name])
        plain = {key: value for key, value in OPTIONS[name].items() if key in ("loss", "beta")}
        without = caught(policy_of(family), grpo_config(**SIZES, **plain), tweaked_lengths, lr=0.006)
        loss = Tally.of(step(with_samples(without, samples_of(family)))).means()["grpo_loss"]
        changed.append(Tally.of(report).means()["grpo_loss"] != pytest.approx(loss, rel=1e-6))
    assert any(changed)  # delta needs a bad token that becomes more likely, which not all weights and samples have


# Rows: a known value, no opinion of one function, of both; a group in which all agree; one known value in a group.
SEVERAL: dict[str, Values] = {
    "no opinions": [[1, None, 0.3, None, 5, 2, 2, None], [0.1, 0.4, None, None, 0.2, 0.2, 0.1, 0.7]],
    "a function that agrees in a group": [[0.01] * 4 + [0, 1, 0, 0], [3, 1, 4, 1, 5, 9, 2, 6]],
    "a function of one opinion in a group": [[7, None, None, None, 1, 2, 3, 4], [3, 1, 4, 1, 5, 9, 2, 6]],
    "three functions": [[1, 0, 0, 1, 0, 0, 1, 0], [0.5, 0.2, 0.1, 0, None, 0, 1, 2], [-3, -1, 4, 1, 5, -9, 2, 6]],
}


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("reward_aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_several_reward_functions_become_advantages_by_the_definition(name: str, reward_aggregation: Any) -> None:
    agrees("gpt2", SEVERAL[name], reward_aggregation=reward_aggregation)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_every_scale_of_rewards_is_its_definition(scale_rewards: Any) -> None:
    agrees("gpt2", SEVERAL["no opinions"], scale_rewards=scale_rewards)

"""What a step does on average, by listing every completion and every group of a small language: no sampling noise.

Equalities hold to 1e-12 of the gradient's length. What is biased is shown to be so, and by how much: every number of
the recorded report is computed again here.
"""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import benchmarks
from benchmarks.exact import enumeration
from benchmarks.exact.comparison import compare, relative_error
from benchmarks.exact.enumeration import (
    Estimator,
    arbitrary_rewards,
    contains,
    gpt2_policy,
    moved,
    settings,
    steps,
    table_policy,
    true_gradient,
    world,
)
from benchmarks.exact.kl import FREE, OFF_POLICY, WHOLE_RATIO
from benchmarks.exact.rewards import SHARES, guesses, two_prompts
from benchmarks.exact.table import AGGREGATIONS, WORD, language
from benchmarks.exact_gradient import report
from grpo_core.config import LOSSES, Aggregation
from grpo_core.objective import EPSILON
from grpo_core.reference import Reference
from grpo_core.step import Learner, grpo_step
from rewards import Reward
from sft_core.model.policy import Policy
from tests.helpers import EXAMPLES, GradientCatcher

EXACT = 1e-12

WORLDS = {"table": language(), "gpt2": (world(5, 3), gpt2_policy())}
networks = pytest.mark.parametrize("network", WORLDS)


def test_all_completions_and_all_steps_have_total_probability_one() -> None:
    for here, policy in WORLDS.values():
        assert float(here.chance(policy).sum().detach()) == pytest.approx(1, abs=EXACT)
    here, policy = world(4, 2, prompts=2), table_policy(4, 2, prompts=2)
    chance_BC = here.chance(policy).detach().view(2, -1)
    assert [float(steps(chance_BC, G)[1].sum()) for G in (1, 2)] == pytest.approx([1, 1], abs=EXACT)


def test_groups_up_to_order_stand_for_every_ordered_group(monkeypatch: pytest.MonkeyPatch) -> None:
    def ordered(chance_C: Tensor, G: int) -> tuple[Tensor, Tensor]:
        index_SG = torch.tensor(list(product(range(len(chance_C)), repeat=G)))
        return index_SG, chance_C[index_SG].prod(dim=1)

    here, policy = world(4, 2), table_policy(4, 2)
    estimator = Estimator(here, settings(2, 3, loss="dapo", scale_rewards="group"), arbitrary_rewards(len(here.rows)))
    unordered = estimator.direction(policy)
    monkeypatch.setattr(enumeration, "multisets", ordered)
    assert relative_error(estimator.direction(policy), unordered) < EXACT


def mean_gradient_of_grpo_step(estimator: Estimator, policy: Policy) -> Tensor:
    """The mean direction of `grpo_step` itself, called once for every step that can be drawn."""
    here, config, B = estimator.world, estimator.config, estimator.world.prompts
    logp_RT = here.logp(policy).detach()
    row_SN, chance_S = steps(logp_RT.sum(dim=1).exp().view(B, -1), config.group_size)

    def pay(prompts: Any, completions: list[str], **columns: Any) -> list[float]:
        return [float(estimator.reward_R[int(text)]) for text in completions]

    reference = Reference(estimator.reference) if estimator.reference else None
    catcher = GradientCatcher(policy, 8)
    for row_N in row_SN:
        drawn = here.samples(row_N, logp_RT)
        rewards = [Reward("reward", pay)]
        parts = Learner(config, policy, reference, rewards, catcher, lambda *_, drawn=drawn: drawn)  # type: ignore
        grpo_step(parts, EXAMPLES[:B])
    each = (torch.cat([g.flatten() for g in step.values()]) for step in catcher.gradients)
    return -sum((chance * step for chance, step in zip(chance_S, each, strict=True)), torch.zeros(()))


@pytest.mark.parametrize(
    ("prompts", "fields"),
    [
        (1, {}),
        (1, {"loss": "dapo", "scale_rewards": "group", "beta": 0.3, "mask_truncated": True}),
        (1, {"loss": "gspo", "beta": 0.3, "kl_correction": True}),
        (2, {"loss": "grpo", "scale_rewards": "batch"}),
    ],
)
def test_the_enumerated_gradient_is_the_mean_of_grpo_steps_own(prompts: int, fields: dict[str, Any]) -> None:
    """On a network: GPT-2 for one prompt, and a table for two."""
    here = world(5, 3 - prompts, prompts)
    policy = gpt2_policy() if prompts == 1 else table_policy(5, 1, prompts)
    fields = {"aggregation": None} | fields if "loss" in fields else fields
    config = settings(here.budget, 2, device="cpu", precision="float32", **fields)
    reference = moved(policy, 0.3) if config.beta else None
    estimator = Estimator(here, config, arbitrary_rewards(len(here.rows)), reference=reference)
    expected = estimator.direction(policy)
    assert relative_error(mean_gradient_of_grpo_step(estimator, policy), expected) < EXACT
    if not fields:
        assert relative_error(expected, true_gradient(here, policy, estimator.reward_R) / 2) < EXACT


# Advantages


@pytest.mark.parametrize(("aggregation", "unit"), [("sequence_sum", 1), ("constant_length", 3)])
@pytest.mark.parametrize(("network", "G"), [("table", 2), ("table", 3), ("table", 4), ("gpt2", 2), ("gpt2", 3)])
def test_unscaled_advantages_give_the_true_gradient_times_g_minus_1_over_g(
    network: str, G: int, aggregation: Aggregation, unit: int
) -> None:
    here, policy = WORLDS[network]
    reward_R = arbitrary_rewards(len(here.rows))
    direction = Estimator(here, settings(3, G, aggregation=aggregation), reward_R).direction(policy)
    assert relative_error(direction * unit * G / (G - 1), true_gradient(here, policy, reward_R)) < EXACT


def weight_of_a_prompt(share: float, G: int) -> float:
    """By how much a prompt's gradient is stretched when rewards of 0 and 1 are divided by their group's standard
    deviation: the
    advantage of a right answer minus that of a wrong one, mean over how many of the G - 1 others are right."""

    def advantage(right: int, own: int) -> float:
        std = math.sqrt(right * (G - right) / (G * (G - 1)))
        return (own - right / G) / (std + EPSILON) if 0 < right < G else 0.0

    return sum(
        math.comb(G - 1, k) * share**k * (1 - share) ** (G - 1 - k) * (advantage(k + 1, 1) - advantage(k, 0))
        for k in range(G)
    )


@pytest.mark.parametrize("G", [2, 3, 4, 8])
@pytest.mark.parametrize("share", SHARES)
def test_dividing_by_the_groups_standard_deviation_weights_a_prompt_by_its_difficulty(share: float, G: int) -> None:
    here, policy = guesses((share,))
    right_R = (here.rows.completion_NT == WORD).any(dim=1).double()
    direction = Estimator(here, settings(1, G, scale_rewards="group"), right_R).direction(policy)
    truth = true_gradient(here, policy, right_R)
    assert relative_error(direction, weight_of_a_prompt(share, G) * truth) < EXACT


def test_re_weighting_by_difficulty_begins_with_groups_of_four_and_grows() -> None:
    hard_to_middling = [weight_of_a_prompt(0.02, G) / weight_of_a_prompt(0.5, G) for G in (2, 3, 4, 8, 16)]
    assert hard_to_middling[:2] == pytest.approx([1, 1], abs=1e-3)
    assert hard_to_middling[2:] == pytest.approx([1.066, 1.387, 1.863], abs=1e-3)


def test_dividing_by_a_standard_deviation_turns_the_gradient_of_graded_rewards() -> None:
    here, policy, reward_KR = two_prompts()
    truth = true_gradient(here, policy, reward_KR.sum(dim=0))
    each = {"scale_rewards": "group", "reward_aggregation": "normalize_then_sum"}
    kinds: list[tuple[dict[str, str], Tensor]] = [
        ({"scale_rewards": "batch"}, reward_KR.sum(dim=0)),
        ({"scale_rewards": "group"}, reward_KR.sum(dim=0)),
        (each, reward_KR),
    ]
    rest = [compare(Estimator(here, settings(1, 4, **f), r).direction(policy), truth).rest for f, r in kinds]
    assert rest == pytest.approx([0.2530, 0.5243, 0.5888], abs=1e-4)


# Weights


@networks
def test_sequence_mean_raises_the_advantage_per_token_of_length(network: str) -> None:
    """(G - 1) / G times the gradient of E[(r - mean r) / length], the mean held fixed; not that of E[r]."""
    here, policy = WORLDS[network]
    reward_R, G = contains(here, WORD), 2
    direction = Estimator(here, settings(3, G, aggregation="sequence_mean"), reward_R).direction(policy)
    mean = (here.chance(policy) * reward_R).sum().detach()
    per_token = true_gradient(here, policy, (reward_R - mean) / here.length_R)
    assert relative_error(direction * G / (G - 1), per_token) < EXACT
    assert compare(direction, true_gradient(here, policy, reward_R)).rest > 0.05


def test_token_mean_is_biased_by_the_groups_own_lengths_and_less_so_in_larger_groups() -> None:
    here, policy = language()
    reward_R = contains(here, WORD)
    truth = true_gradient(here, policy, reward_R)
    estimators = [Estimator(here, settings(3, G, aggregation="token_mean"), reward_R) for G in (2, 3, 4)]
    rest = [compare(estimator.direction(policy), truth).rest for estimator in estimators]
    assert rest == pytest.approx([0.0993, 0.0626, 0.0454], abs=1e-4)


def pull_on_wrong_answers(aggregation: Aggregation) -> list[float]:
    """On each token of a wrong answer of length 1, 2 and 3."""
    here, policy = language()
    pull_R = Estimator(here, settings(3, 3, aggregation=aggregation), contains(here, WORD)).pull(policy)[:, 0]
    wrong_R = contains(here, WORD) == 0
    return [float(pull_R[wrong_R & (here.length_R == length)].mean()) for length in (1, 2, 3)]


def test_means_over_tokens_punish_a_token_of_a_short_wrong_answer_more_than_one_of_a_long() -> None:
    one, two, three = pull_on_wrong_answers("sequence_mean")
    assert one < 0 and [two, three] == pytest.approx([one / 2, one / 3], rel=EXACT)
    one, two, three = pull_on_wrong_answers("token_mean")
    assert one < two < three < 0
    for aggregation in AGGREGATIONS[:2]:
        one, two, three = pull_on_wrong_answers(aggregation)
        assert one < 0 and [two, three] == pytest.approx([one, one], rel=EXACT)


# Ratios and masks


@networks
def test_off_policy_only_the_ratio_of_the_whole_completion_is_unbiased(network: str) -> None:
    here, policy = WORLDS[network]
    reward_R, sampler = arbitrary_rewards(len(here.rows)), moved(policy, 0.3)
    truth = true_gradient(here, policy, reward_R)
    for fields in OFF_POLICY.values():
        direction = Estimator(here, settings(3, 2, **fields), reward_R, sampler).direction(policy)
        if fields == WHOLE_RATIO:
            assert relative_error(2 * direction, truth) < EXACT
        else:
            assert compare(direction, truth).rest > 0.02


def test_off_policy_a_tokens_own_ratio_is_unbiased_where_completions_have_one_token() -> None:
    here, policy, reward_R = world(4, 1), table_policy(4, 1), arbitrary_rewards(4)
    direction = Estimator(here, settings(1, 2, **FREE), reward_R, moved(policy, 0.5)).direction(policy)
    assert relative_error(2 * direction, true_gradient(here, policy, reward_R)) < EXACT


def test_clipping_removes_only_gradients_that_push_further_beyond_the_bounds() -> None:
    """One-token completions, G = 2: the gradient of E[h] with h(c) the mean of (r_c - r_d) / 2 over partners d, but 0
    for the pairs where c is the better one and likelier than 1.2 times before, or the worse one and rarer than 0.8."""
    here, policy, reward_R = world(5, 1), table_policy(5, 1), arbitrary_rewards(5)
    sampler = moved(policy, 0.5, seed=9)
    old_R, ratio_R = here.chance(sampler).detach(), (here.chance(policy) / here.chance(sampler)).detach()
    advantage_RR = (reward_R[:, None] - reward_R) / 2
    likelier_R1, rarer_R1 = (ratio_R > 1.2)[:, None], (ratio_R < 0.8)[:, None]
    good_RR, bad_RR = likelier_R1 & (advantage_RR > 0), rarer_R1 & (advantage_RR < 0)
    assert good_RR.any() and bad_RR.any() and (advantage_RR.bool() & ~good_RR & ~bad_RR).any()
    h_R = torch.where(good_RR | bad_RR, 0.0, advantage_RR) @ old_R
    direction = Estimator(here, settings(1, 2), reward_R, sampler).direction(policy)
    assert relative_error(direction, true_gradient(here, policy, h_R)) < EXACT


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_on_policy_every_published_loss_has_one_gradient_under_the_same_weights(
    name: Any, aggregation: Aggregation
) -> None:
    here, policy = language()
    reward_R, fields = arbitrary_rewards(len(here.rows)), {"aggregation": aggregation, "scale_rewards": "group"}
    clip = Estimator(here, settings(3, 2, **fields), reward_R)
    loss = Estimator(here, settings(3, 2, loss=name, **fields), reward_R)
    assert relative_error(loss.direction(policy), clip.direction(policy)) < EXACT


@pytest.mark.parametrize("aggregation", ["sequence_sum", "constant_length"])
def test_a_truncated_completion_left_out_counts_as_if_it_were_worth_the_mean(aggregation: Aggregation) -> None:
    here, policy = language()
    reward_R, unit = contains(here, WORD), 1 if aggregation == "sequence_sum" else 3
    config = settings(3, 3, aggregation=aggregation, mask_truncated=True)
    direction = Estimator(here, config, reward_R).direction(policy)
    mean = (here.chance(policy) * reward_R).sum().detach()
    as_mean = true_gradient(here, policy, torch.where(here.truncated_R, mean, reward_R))
    assert relative_error(direction * unit * 3 / 2, as_mean) < EXACT
    assert compare(direction, true_gradient(here, policy, reward_R)).rest == pytest.approx(0.1960, abs=1e-4)


# The record


def test_the_recorded_report_is_what_the_code_computes() -> None:
    recorded = (Path(benchmarks.__file__).parent / "results" / "exact-gradient.md").read_text()
    number = re.compile(r"-?\d+(?:\.\d+)?")
    now, then = report(), recorded.rsplit("\n\n", 1)[0]  # but for the versions
    assert number.sub("#", now).split() == number.sub("#", then).split()
    found, expected = ([float(text) for text in number.findall(document)] for document in (now, then))
    assert found == pytest.approx(expected, abs=1.1e-4)

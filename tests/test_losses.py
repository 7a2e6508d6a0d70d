"""A setting reaches its piece of mathematics and no other, and one that is off costs
nothing."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from grpo_core.config import LOSSES, GRPOConfig, Loss
from grpo_core.objective import clipped_surrogate, group_advantages, importance_ratio, k3_kl, token_advantages
from grpo_core.step import Rollout, advantages, kl_penalty, policy_loss, sample_groups
from grpo_core.variants import cispo, decoupled_advantages, ended_rows, near_policy_rows, sapo, vespo
from rewards import Scores
from sft_core.learn.rows import pack_rows
from tests.helpers import (
    EXAMPLES,
    attention_of,
    ends_often,
    grpo_config,
    tiny_policy,
)

NAN = float("nan")
VARIANTS = ("cispo", "sapo", "vespo", "high_entropy_tokens", "near_policy_rows")

MASK = torch.tensor([[True, True, True], [True, True, False]])
OLD = torch.where(MASK, torch.tensor([[-1.0, -0.3, -2.0], [-0.7, -1.5, 0.0]]), 0.0)
NEW = torch.where(MASK, torch.tensor([[-0.4, -0.9, -2.1], [-0.2, -2.5, 0.0]]), 0.0)
ADVANTAGE = torch.tensor([[1.5, 1.5, 1.5], [-0.5, -0.5, 0.0]])
RATIO = (NEW - OLD).exp()


# --- which three choices are in force ---


@pytest.mark.parametrize("name", LOSSES)
def test_a_name_stands_for_its_three_choices(name: Any) -> None:
    assert GRPOConfig(loss=name).objective == LOSSES[name]


def test_the_names_of_the_flag_are_those_of_the_table() -> None:
    assert set(get_args(get_type_hints(GRPOConfig)["loss"])) == set(LOSSES)


def test_the_default_is_dapos_loss() -> None:
    assert GRPOConfig().objective == Loss("token", "clip", "token_mean")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("place", "choice"),
    [
        *((0, level) for level in ("token", "sequence")),
        *((1, token_loss) for token_loss in ("clip", "cispo", "sapo", "vespo")),
        *((2, weights) for weights in ("token_mean", "sequence_mean", "constant_length", "sequence_sum")),
    ],
)
def test_a_choice_of_its_own_replaces_the_names_and_leaves_the_others(name: Any, place: int, choice: str) -> None:
    expected = list(LOSSES[name])
    expected[place] = choice
    flag = ("ratio_level", "token_loss", "aggregation")[place]
    assert GRPOConfig(loss=name, **{flag: choice}).objective == tuple(expected)  # type: ignore[arg-type]


# --- what a token contributes ---


def loss_of(ratio: Tensor = RATIO, **options: Any) -> Tensor:
    return policy_loss(ratio, NEW, OLD, MASK, ADVANTAGE, grpo_config(**options))


def test_the_clipped_surrogate_gets_both_epsilons_and_delta() -> None:
    found = loss_of(epsilon_low=0.1, epsilon_high=0.3)
    assert torch.equal(found, clipped_surrogate(RATIO, ADVANTAGE, 0.1, 0.3))
    assert not torch.equal(found, clipped_surrogate(RATIO, ADVANTAGE, 0.3, 0.1))
    bounded = loss_of(epsilon_low=0.1, epsilon_high=0.3, delta=1.4)
    assert torch.equal(bounded, clipped_surrogate(RATIO, ADVANTAGE, 0.1, 0.3, 1.4)) and not torch.equal(bounded, found)


def test_cispo_gets_the_upper_epsilon() -> None:
    found = loss_of(loss="cispo", epsilon_low=0.1, epsilon_high=0.3)
    assert torch.equal(found, cispo(RATIO, NEW, ADVANTAGE, 0.3))
    assert not torch.equal(found, cispo(RATIO, NEW, ADVANTAGE, 0.1))


def test_sapo_gets_each_signs_temperature() -> None:
    found = loss_of(loss="sapo", sapo_temperature_pos=0.5, sapo_temperature_neg=2.0)
    assert torch.equal(found, sapo(RATIO, ADVANTAGE, 0.5, 2.0))
    assert not torch.equal(found, sapo(RATIO, ADVANTAGE, 2.0, 0.5))


def test_vespo_gets_each_signs_powers() -> None:
    powers = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 4.0}
    assert torch.equal(loss_of(loss="vespo", **powers), vespo(NEW, OLD, ADVANTAGE, (1.0, 2.0), (3.0, 4.0)))
    assert torch.equal(loss_of(loss="vespo"), vespo(NEW, OLD, ADVANTAGE, (2.0, 3.0), (3.0, 2.0)))


@pytest.mark.parametrize("token_loss", ["clip", "cispo", "sapo", "vespo"])
def test_rows_that_the_policy_has_left_lose_any_token_loss(token_loss: Any) -> None:
    """The second row is bad and has become unlikelier by 0.25 nats a token."""
    free, dropped = loss_of(token_loss=token_loss), loss_of(token_loss=token_loss, off_policy_threshold=0.2)
    assert torch.equal(dropped[0], free[0]) and (dropped[1] == 0).all() and (free[1] != 0).any()
    assert torch.equal(loss_of(token_loss=token_loss, off_policy_threshold=0.3), free)
    near = near_policy_rows(NEW, OLD, MASK, ADVANTAGE, 0.2)
    assert torch.equal(dropped, free * near)


@pytest.mark.parametrize("token_loss", ["clip", "cispo", "sapo", "vespo"])
def test_a_sequences_ratio_makes_a_loss_for_each_token(token_loss: Any) -> None:
    ratio_N1 = importance_ratio(NEW, OLD, MASK, "sequence")
    assert loss_of(ratio_N1, token_loss=token_loss).shape == MASK.shape


# --- the ratio of a whole completion ---


def test_a_sequences_ratio_is_the_geometric_mean_of_its_own_tokens() -> None:
    found = importance_ratio(NEW, OLD, MASK, "sequence")
    of_tokens = RATIO.tolist()
    expected = [math.prod(of_tokens[0]) ** (1 / 3), math.prod(of_tokens[1][:2]) ** (1 / 2)]
    assert found.shape == (2, 1) and found.flatten().tolist() == pytest.approx(expected)


def test_padding_does_not_change_a_sequences_ratio() -> None:
    wide = [torch.nn.functional.pad(tensor, (0, 5)) for tensor in (NEW, OLD, MASK)]
    torch.testing.assert_close(importance_ratio(*wide, "sequence"), importance_ratio(NEW, OLD, MASK, "sequence"))


def test_a_sequence_without_tokens_has_ratio_one() -> None:
    nothing = torch.zeros(1, 3)
    assert importance_ratio(nothing, nothing, nothing.bool(), "sequence").tolist() == [[1.0]]


def test_a_sequences_ratio_passes_its_gradient_to_every_token_evenly() -> None:
    logp = OLD.clone().requires_grad_()
    importance_ratio(logp, OLD, MASK, "sequence").sum().backward()
    torch.testing.assert_close(logp.grad[0], torch.full((3,), 1 / 3))  # type: ignore[index]
    torch.testing.assert_close(logp.grad[1, :2], torch.full((2,), 1 / 2))  # type: ignore[index]


# --- KL ---


def test_the_kl_is_k3_and_its_correction_the_ratio_with_its_gradient() -> None:
    ref = torch.where(MASK, OLD - 0.4, 0.0)
    assert torch.equal(kl_penalty(RATIO, NEW, ref, grpo_config(beta=0.1)), k3_kl(NEW, ref))
    config = grpo_config(beta=0.1, kl_correction=True)
    assert torch.equal(kl_penalty(RATIO, NEW, ref, config), k3_kl(NEW, ref) * RATIO)
    logp = OLD.clone().requires_grad_()
    kl_penalty((logp - OLD).exp(), logp, ref, config).sum().backward()
    k3 = math.exp(-0.4) + 0.4 - 1  # d/dlogp of r * k3 at r = 1 is k3 + (1 - exp(-0.4)): 0.4, the log-ratio itself
    torch.testing.assert_close(logp.grad[MASK], torch.full((5,), k3 + 1 - math.exp(-0.4)))  # type: ignore[index]


def test_the_mean_gradient_of_the_corrected_kl_is_that_of_the_true_kl() -> None:
    """Over all tokens, as often as the policy samples them."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    logp, ref = logits.log_softmax(dim=0), ref_logits.log_softmax(dim=0)
    truth = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)[0]
    corrected = kl_penalty((logp - logp.detach()).exp(), logp, ref, grpo_config(beta=0.1, kl_correction=True))
    found = torch.autograd.grad((logp.exp().detach() * corrected).sum(), logits)[0]
    torch.testing.assert_close(found, truth)


# --- advantages ---


def test_each_order_of_adding_up_and_normalising_is_reached() -> None:
    values: dict[str, list[float | None]] = {"a": [0, 10, 0, 10, None, 1], "b": [0.1, 0.0, 0.2, 0.1, 0.3, None]}
    totals = [0.2, 10.0, 0.4, 10.2, 0.6, 1.0]
    reward_BG = torch.tensor(totals, dtype=torch.float64).view(2, 3)

    def rollout(weights: dict[str, float] | None = None) -> Rollout:
        samples: Any = None  # not looked at
        return Rollout([], samples, Scores(totals, values, weights or {}), reward_BG)

    for scale in ("group", "batch", "none"):
        config = grpo_config(scale_rewards=scale, reward_weights=[1.0, 2.0])
        assert torch.equal(advantages(rollout(), config), group_advantages(reward_BG, scale))
    value_KBG = torch.tensor([[v if v is not None else NAN for v in values[name]] for name in "ab"]).double()
    for weights in ([1.0, 2.0], []):
        config = grpo_config(reward_aggregation="normalize_then_sum", reward_weights=weights)
        expected = decoupled_advantages(value_KBG.view(2, 2, 3), torch.tensor(weights or [1.0, 1.0]).double())
        found = advantages(rollout(dict(zip("ab", weights, strict=False))), config)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_decoupled_advantages_are_normalised_twice() -> None:
    values = [[[0.0, 10.0, 5.0], [NAN, 1.0, 3.0]], [[0.3, 0.1, 0.1], [0.2, NAN, 0.2]]]
    weights = [1.0, 0.5]
    sums = [[0.0] * 3, [0.0] * 3]
    for k in range(2):
        for b in range(2):
            known = [v for v in values[k][b] if not math.isnan(v)]
            for g in range(3):
                if not math.isnan(values[k][b][g]) and len(set(known)) > 1:
                    sums[b][g] += weights[k] * (values[k][b][g] - fmean(known)) / (stdev(known) + 1e-4)
    flat = sums[0] + sums[1]
    expected = [[(value - fmean(flat)) / (stdev(flat) + 1e-4) for value in group] for group in sums]
    found = decoupled_advantages(torch.tensor(values, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_row_that_no_function_judged_has_advantage_zero_and_counts_in_no_mean() -> None:
    values = torch.tensor([[[NAN, 1.0, 3.0]], [[NAN, 2.0, 0.5]]], dtype=torch.float64)
    found = decoupled_advantages(values, torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert found[0, 0] == 0 and found[0, 1] == pytest.approx(-found[0, 2]) and found[0, 1] != 0


def test_decoupling_makes_a_small_standard_deviation_count_as_much_as_a_large_one() -> None:
    large, small = [0.0, 100.0, 0.0, 100.0], [0.0, 0.1, 0.1, 0.0]
    found = decoupled_advantages(torch.tensor([[large], [small]]), torch.ones(2))[0]
    assert found[0] == pytest.approx(-found[1]) and found[2].abs() < 2e-3 and found[3].abs() < 2e-3


def test_decoupling_gives_groups_that_agree_on_everything_no_advantage_and_leaves_its_inputs_unchanged() -> None:
    values, weights = torch.full((2, 2, 3), 0.01), torch.ones(2)
    assert (decoupled_advantages(values, weights) == 0).all()
    decoupled_advantages(values, weights).fill_(7)
    assert (values == 0.01).all() and (weights == 1).all()


# --- rows and tokens that teach ---


def test_truncated_rows_lose_their_completion() -> None:
    policy = ends_often(tiny_policy())
    torch.manual_seed(0)
    samples = sample_groups(policy, EXAMPLES, grpo_config(group_size=4))
    assert samples.truncated_N.any() and not samples.truncated_N.all()
    before = samples.rows.completion_len_N.clone()
    learned = ended_rows(samples)
    assert torch.equal(learned.completion_len_N, torch.where(samples.truncated_N, 0, before))
    assert torch.equal(samples.rows.completion_len_N, before)
    kept = [[] if cut else ids for cut, ids in zip(samples.truncated_N, samples.rows.completion_ids(), strict=True)]
    assert learned.completion_ids() == kept and learned.prompt_ids() == samples.rows.prompt_ids()


def test_rows_without_completions_keep_their_place_and_attend_to_nothing_behind_the_prompt() -> None:
    rows = pack_rows([[5, 6], [7], [8]], [[8, 2], [9, 4, 2], [3]], pad_id=0)
    left = rows.without_completions(torch.tensor([False, True, False]))
    assert left.completion_ids() == [[8, 2], [], [3]] and left.prompt_ids() == [[5, 6], [7], [8]]
    assert left.mask_NT.tolist() == [[True, True, False], [False] * 3, [True, False, False]]
    assert attention_of(left)[1].tolist() == [0, 1, 0, 0, 0]
    assert rows.completion_ids() == [[8, 2], [9, 4, 2], [3]]


def test_an_advantage_acts_on_the_kept_tokens_of_its_own_row() -> None:
    advantage_BG = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    found = token_advantages(advantage_BG, MASK, torch.float32)
    assert found.dtype == torch.float32 and found.tolist() == [[1, 1, 1], [-2, -2, 0]]

"""What `grpo_core.variants` claims: each published change of the objective, by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_core.objective import clipped_surrogate
from grpo_core.variants import cispo, high_entropy_tokens, near_policy_rows, sapo, vespo

INF = float("inf")


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def slope(token_loss: Callable[[Tensor], Tensor], at: float) -> float:
    """The derivative of a single token's loss."""
    x = table([at]).requires_grad_()
    token_loss(x).sum().backward()
    assert x.grad is not None
    return x.grad.item()


# --- CISPO ---


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize(
    ("ratio", "weight"), [(0.01, 0.01), (0.5, 0.5), (1.0, 1.0), (1.25, 1.25), (1.3, 1.3), (7, 1.3)]
)
def test_cispo_bounds_the_weight_from_above_only_whatever_the_advantage(
    ratio: float, weight: float, advantage: float
) -> None:
    loss = cispo(table([ratio]), table([-0.5]), table([advantage]), epsilon_high=0.3)
    assert loss.item() == pytest.approx(-weight * advantage * -0.5)


@pytest.mark.parametrize(("ratio", "weight"), [(0.5, 0.5), (7.0, 1.3)])
def test_every_cispo_token_pulls_by_its_weight_through_its_log_probability_alone(ratio: float, weight: float) -> None:
    old = math.log(0.4)

    def loss(logp: Tensor) -> Tensor:
        return cispo((logp - old).exp(), logp, table([-2.0]), epsilon_high=0.3)

    # Were the weight not detached, the slope at ratio 0.5 would be that times 1 + log pi.
    assert slope(loss, old + math.log(ratio)) == pytest.approx(2.0 * weight)


# --- SAPO ---


@pytest.mark.parametrize(("advantage", "tau"), [(2.0, 0.7), (-2.0, 1.6), (0.0, 1.6)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 2.5])
def test_sapo_is_a_sigmoid_of_the_ratio_with_a_temperature_for_each_sign(
    ratio: float, advantage: float, tau: float
) -> None:
    expected = -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * advantage
    found = sapo(table([ratio]), table([advantage]), temperature_pos=0.7, temperature_neg=1.6)
    assert found.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("advantage", [2.0, -0.5])
@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_the_first_update_of_sapo_is_the_policy_gradient(advantage: float, tau: float) -> None:
    assert slope(lambda ratio: sapo(ratio, table([advantage]), tau, tau), 1.0) == pytest.approx(-advantage)


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_sapo_fades_evenly_on_both_sides_and_never_quite_stops(advantage: float) -> None:
    def pull(ratio: float) -> float:
        return abs(slope(lambda r: sapo(r, table([advantage]), 2.0, 3.0), ratio))

    assert pull(0.6) == pytest.approx(pull(1.4))
    assert pull(1.0) > pull(1.4) > pull(2.0) > pull(4.0) > 0


# --- VESPO ---


def vespo_phi(log_ratios: list[float], advantage: float, **powers: Any) -> list[float]:
    """phi of each token, read off the slope with respect to its log-probability."""
    logp = table([-1.0] * len(log_ratios)).requires_grad_()
    vespo(logp, logp.detach() - table(log_ratios), table([advantage]), **powers).sum().backward()
    assert logp.grad is not None
    return (logp.grad / -advantage).flatten().tolist()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_vespo_is_the_policy_gradient_where_nothing_has_moved(advantage: float) -> None:
    assert vespo_phi([0.0, 0.0, 0.0], advantage) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("advantage", "k", "decay"), [(2.0, 1.5, 2.5), (-2.0, 0.5, 3.5)])
def test_vespo_weights_by_a_gamma_density_of_the_whole_completions_ratio(
    advantage: float, k: float, decay: float
) -> None:
    """W is the product of the tokens' ratios, not their mean; and phi has no gradient of its own."""
    W = math.exp(0.3 - 0.5 + 0.1)
    found = vespo_phi([0.3, -0.5, 0.1], advantage, positive=(1.5, 2.5), negative=(0.5, 3.5))
    assert found == pytest.approx([W**k * math.exp(decay * (1 - W))] * 3)


def test_vespos_value_is_its_weight_times_advantage_and_log_probability() -> None:
    logp, old = table([-1.0, -0.5]), table([-1.0, -1.0])
    W = math.exp(0.5)
    phi = W**2 * math.exp(3 * (1 - W))
    torch.testing.assert_close(vespo(logp, old, table([2.0])), table([2 * phi, phi]))


def test_an_advantage_of_zero_counts_as_positive_for_vespo_and_gives_nothing() -> None:
    logp, old = table([-1.0, -0.5]), table([-1.0, -1.0])
    assert (vespo(logp, old, table([0.0]), negative=(INF, INF)) == 0).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_vespo_falls_on_both_sides_of_one(advantage: float) -> None:
    """With k = lambda the density has its peak at 1; with VESPO's own powers it is at k / lambda."""
    powers = {"positive": (2.0, 2.0), "negative": (3.0, 3.0)}
    phi = [vespo_phi([math.log(W)], advantage, **powers)[0] for W in (0.1, 0.5, 1.0, 2.0, 5.0)]
    assert phi[0] < phi[1] < phi[2] == 1 and phi[2] > phi[3] > phi[4] > 0


def test_vespos_log_ratio_is_bounded_for_each_token_and_for_the_completion() -> None:
    def phi(log_w: float) -> float:
        return math.exp(2 * log_w + 3 - 3 * math.exp(log_w))

    assert vespo_phi([50.0, -19.5], 1.0)[0] == pytest.approx(phi(20 - 19.5))  # the token's ratio at exp(20)
    assert vespo_phi([-50.0, 20.0], 1.0)[0] == pytest.approx(phi(0.0))  # and at exp(-20)
    assert vespo_phi([-15.0, -15.0], 1.0)[0] == pytest.approx(phi(math.log(1e-8)), rel=1e-12, abs=0)
    small = {"positive": (1.0, 1e-9)}
    assert vespo_phi([15.0, 15.0], 1.0, **small)[0] == pytest.approx(math.exp(20 + 1e-9 - 1e-9 * math.exp(20)))
    assert vespo_phi([19.0, 19.0, 19.0], 1.0) == [0.0] * 3  # no overflow


def test_vespo_takes_each_rows_own_ratio() -> None:
    logp, old = table([-1.0, -1.0], [-1.0, -1.0]), table([-1.0, -1.0], [-2.0, -1.0])
    first, second = vespo(logp, old, table([1.0], [1.0]))
    assert first.tolist() == [1.0, 1.0]
    torch.testing.assert_close(second, vespo(logp[1:], old[1:], table([1.0]))[0])


# --- the bound on the ratio of bad tokens (INTELLECT-2) ---


def test_delta_bounds_the_cost_of_a_bad_token_that_became_more_probable() -> None:
    def pull(ratio: float, advantage: float) -> float:
        return slope(lambda r: clipped_surrogate(r, table([advantage]), 0.2, 0.2, delta=4.0), ratio)

    assert pull(3.9, -2.0) == 2.0 and pull(4.1, -2.0) == 0
    loss = clipped_surrogate(table([3.0, 4.0, 9.0]), table([-2.0]), 0.2, 0.2, delta=4.0)
    assert loss.tolist() == [[6.0, 8.0, 8.0]]


@pytest.mark.parametrize("ratio", [0.1, 0.7, 1.0, 1.1, 1.5, 3.0, 9.0])
def test_delta_leaves_good_tokens_and_less_probable_bad_ones_alone(ratio: float) -> None:
    """It bounds the first branch of the minimum only, beyond the other's bound."""
    for advantage in (2.0, -2.0) if ratio < 1.5 else (2.0,):
        args = (table([ratio]), table([advantage]), 0.2, 0.2)
        assert torch.equal(clipped_surrogate(*args, delta=1.5), clipped_surrogate(*args))


# --- high-entropy tokens ---


def random_entropies() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask_NT = torch.rand(6, 9, generator=generator) < 0.7
    return torch.where(mask_NT, 3 * torch.rand(6, 9, generator=generator), 0.0), mask_NT


@pytest.mark.parametrize("share", [0.05, 0.2, 1 / 3, 0.5, 0.8, 0.999])
def test_high_entropy_tokens_are_those_above_the_quantile(share: float) -> None:
    entropy_NT, mask_NT = random_entropies()
    bound = torch.quantile(entropy_NT[mask_NT], 1 - share)
    assert torch.equal(high_entropy_tokens(entropy_NT, mask_NT, share), mask_NT & (entropy_NT >= bound - 1e-5))


def test_half_of_six_tokens_are_three_wherever_they_stand() -> None:
    entropy_NT = table([0.6, 0.1, 9.0], [0.2, 0.5, 0.4], [0.3, 0.0, 0.0])
    mask_NT = torch.tensor([[True, True, False], [True, True, True], [True, False, False]])
    kept = high_entropy_tokens(entropy_NT, mask_NT, 0.5)
    assert kept.tolist() == [[True, False, False], [False, True, True], [False, False, False]]


def test_a_tiny_share_keeps_the_token_of_highest_entropy() -> None:
    entropy_NT, mask_NT = random_entropies()
    kept = high_entropy_tokens(entropy_NT, mask_NT, 1e-9)
    assert kept.sum() == 1 and entropy_NT[kept] == entropy_NT.max()


def test_the_whole_share_keeps_every_token() -> None:
    entropy_NT, mask_NT = random_entropies()
    assert torch.equal(high_entropy_tokens(entropy_NT, mask_NT, 1.0), mask_NT)


def test_tokens_of_equal_entropy_are_kept_together() -> None:
    mask_NT = torch.ones(1, 4, dtype=torch.bool)
    assert high_entropy_tokens(table([1.0, 1.0, 1.0, 1.0]), mask_NT, 0.25).all()
    equal_but_for_rounding = table([1.0, 1.000001, 0.999999, 0.5])
    for share in (0.4, 0.6):
        assert high_entropy_tokens(equal_but_for_rounding, mask_NT, share).tolist() == [[True, True, True, False]]


def test_padding_is_never_kept_and_does_not_shift_the_quantile() -> None:
    entropy_NT, mask_NT = random_entropies()
    kept = high_entropy_tokens(entropy_NT, mask_NT, 0.3)
    for filler in (0.0, 99.0):
        wide_NT = torch.nn.functional.pad(torch.where(mask_NT, entropy_NT, filler), (0, 30), value=filler)
        wide_mask_NT = torch.nn.functional.pad(mask_NT, (0, 30))
        found = high_entropy_tokens(wide_NT, wide_mask_NT, 0.3)
        assert torch.equal(found[:, :9], kept) and not found[:, 9:].any()


def test_without_any_token_none_is_kept() -> None:
    assert not high_entropy_tokens(torch.rand(2, 3), torch.zeros(2, 3, dtype=torch.bool), 0.5).any()


def test_one_token_is_kept_whatever_the_share() -> None:
    assert high_entropy_tokens(table([0.7]), torch.ones(1, 1, dtype=torch.bool), 0.01).all()


# --- rows that the policy has left ---


@pytest.mark.parametrize(
    ("advantage", "drift", "kept"),
    [(1.0, 9.0, 1), (0.0, 9.0, 1), (-1.0, 0.5, 1), (-1.0, 0.75, 0), (-1.0, -9.0, 1), (-1.0, 9.0, 0)],
)
def test_only_bad_rows_that_became_unlikely_are_dropped(advantage: float, drift: float, kept: int) -> None:
    """`drift` in nats a token; the threshold itself is still near."""
    old = table([-1.0, -2.0])
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = near_policy_rows(old - drift, old, mask, table([advantage, advantage]), threshold=0.5)
    assert found.tolist() == [[kept, kept]]


def test_the_drift_is_a_mean_over_the_rows_own_tokens() -> None:
    old, new = table([-1.0, -1.0, 0.0, 0.0], [-1.0, -1.0, -1.0, -1.0]), table([-2.2, -1.0, 0, 0], [-2.2, -1, -1, -1])
    mask = torch.tensor([[True, True, False, False], [True] * 4])  # 0.6 and 0.3 nats a token
    bad = table([-1.0], [-1.0]).expand(2, 4)
    assert near_policy_rows(new, old, mask, bad, 0.5)[:, 0].tolist() == [0, 1]
    assert near_policy_rows(new, old, mask, bad, 0.61)[:, 0].tolist() == [1, 1]
    assert near_policy_rows(new, old, mask, bad, 0.29)[:, 0].tolist() == [0, 0]


def test_a_row_without_tokens_is_near() -> None:
    zeros = torch.zeros(1, 2)
    assert near_policy_rows(zeros, zeros, torch.zeros(1, 2, dtype=torch.bool), zeros - 1, 0.1).tolist() == [[1, 1]]


def test_which_rows_are_near_has_no_gradient() -> None:
    logp = table([-3.0]).requires_grad_()
    assert not near_policy_rows(
        logp, table([-1.0]), torch.ones(1, 1, dtype=torch.bool), table([-1.0]), 0.5
    ).requires_grad


# --- all of them ---


def test_the_variants_leave_their_inputs_unchanged() -> None:
    ratio, logp, old, advantage = table([0.5, 3.0]), table([-1.0, -2.0]), table([-3.0, -2.0]), table([1.0, -1.0])
    entropy, mask = table([0.5, 1.5]), torch.ones(1, 2, dtype=torch.bool)
    inputs = [ratio, logp, old, advantage, entropy, mask]
    before = [tensor.clone() for tensor in inputs]
    cispo(ratio, logp, advantage, 0.2).zero_()
    sapo(ratio, advantage, 1.0, 1.05).zero_()
    vespo(logp, old, advantage).zero_()
    clipped_surrogate(ratio, advantage, 0.2, 0.2, delta=1.5).zero_()
    high_entropy_tokens(entropy, mask, 0.5).zero_()
    near_policy_rows(logp, old, mask, advantage, 0.5).zero_()
    assert all(torch.equal(old, new) for old, new in zip(before, inputs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_variants_keep_the_type_of_their_inputs_and_its_precision(dtype: torch.dtype) -> None:
    one, bad = torch.ones(1, 1, dtype=dtype), -torch.ones(1, 1, dtype=dtype)
    half = one / 2
    losses = [cispo(half, bad, bad, 0.2), sapo(half, bad, 1.1, 1.3), vespo(bad, bad / 2, bad, negative=(1.1, 1.3))]
    W = math.exp(-0.5)
    expected = [-0.5, 4 / 1.3 / (1 + math.exp(1.3 * 0.5)), -(W**1.1) * math.exp(1.3 * (1 - W))]
    assert all(loss.dtype == dtype for loss in losses)
    rounding = 1e-6 if dtype == torch.float32 else 1e-14
    assert [loss.item() for loss in losses] == pytest.approx(expected, rel=rounding)

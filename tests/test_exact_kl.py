"""What each KL estimator does to the gradient, enumerated."""

from __future__ import annotations

import pytest

from benchmarks.exact.comparison import compare, relative_error
from benchmarks.exact.enumeration import (
    World,
    gradient,
    moved,
)
from benchmarks.exact.kl import kl_as_reward, kl_gradients, kl_term, sampled_kl
from grpo_core.config import Aggregation
from grpo_core.objective import k3_kl
from sft_core.model.policy import Policy
from tests.test_exact_gradient import EXACT, WORLDS, networks

# KL


def kl_setting(network: str) -> tuple[World, Policy, Policy]:
    here, policy = WORLDS[network]
    return here, policy, moved(policy, 0.7 if network == "table" else 0.2, seed=5)


@networks
def test_k1_as_a_loss_has_no_expected_gradient(network: str) -> None:
    here, policy, reference = kl_setting(network)
    k1 = sampled_kl(lambda logp, ref: logp - ref, here, policy, reference)
    assert k1.norm() < EXACT * kl_gradients(here, policy, reference).sequence.norm()


@networks
def test_k3_as_a_loss_pulls_with_kl_of_ref_to_policy_at_the_visited_prefixes(network: str) -> None:
    here, policy, reference = kl_setting(network)
    true = kl_gradients(here, policy, reference)
    k3 = -kl_term(here, reference).direction(policy)
    assert relative_error(k3, true.forward) < EXACT
    assert compare(k3, true.reverse).rest > 0.05


@networks
def test_k3_times_the_ratio_pulls_with_kl_of_policy_to_ref_at_the_visited_prefixes(network: str) -> None:
    """Off-policy too, at the prefixes that the sampler visits (DeepSeek-V3.2's claim); and as k2 does on-policy."""
    here, policy, reference = kl_setting(network)
    sampler, true = moved(policy, 0.3, seed=6), kl_gradients(here, policy, reference)
    corrected = -kl_term(here, reference, kl_correction=True).direction(policy)
    assert relative_error(corrected, true.reverse) < EXACT
    assert relative_error(sampled_kl(lambda a, b: (a - b).square() / 2, here, policy, reference), corrected) < EXACT
    visited = kl_gradients(here, policy, reference, sampler)
    off = -kl_term(here, reference, sampler, kl_correction=True).direction(policy)
    assert relative_error(off, visited.reverse) < EXACT
    assert compare(-kl_term(here, reference, sampler).direction(policy), visited.forward).rest > 0.05


@networks
def test_no_kl_loss_on_tokens_sees_that_the_policy_chooses_its_prefixes(network: str) -> None:
    """What it lacks of the gradient of the sequences' KL is KL at each prefix times the gradient of its frequency."""
    here, policy, reference = kl_setting(network)
    true = kl_gradients(here, policy, reference)
    new_RTV, ref_RTV = here.next_token_logp(policy), here.next_token_logp(reference)
    kl_RT = ((new_RTV.exp() * (new_RTV - ref_RTV)).sum(dim=-1) * here.mask_RT).detach()
    through_prefixes = gradient((here.chance(policy) * kl_RT.sum(dim=1)).sum(), policy)
    assert relative_error(true.reverse + through_prefixes, true.sequence) < EXACT
    assert through_prefixes.norm() > 0.1 * true.sequence.norm()


@networks
def test_kl_in_the_reward_has_the_gradient_of_the_sequences_kl(network: str) -> None:
    here, policy, reference = kl_setting(network)
    in_reward = -kl_as_reward(here, policy, reference).direction(policy)
    assert relative_error(2 * in_reward, kl_gradients(here, policy, reference).sequence) < EXACT


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_weights_that_depend_on_lengths_bias_the_gradient_of_both_kl_terms(aggregation: Aggregation) -> None:
    here, policy, reference = kl_setting("table")
    true = kl_gradients(here, policy, reference)
    for corrected, truth in ((False, true.forward), (True, true.reverse)):
        term = kl_term(here, reference, kl_correction=corrected, aggregation=aggregation)
        assert compare(-term.direction(policy), truth).rest > 0.1


@networks
def test_k1_and_k3_have_the_true_kl_for_their_mean(network: str) -> None:
    """Of completions, summed over tokens, and so of any one token."""
    here, policy, reference = kl_setting(network)
    logp_RT, ref_RT = here.logp(policy).detach(), here.logp(reference).detach()
    chance_R = logp_RT.sum(dim=1).exp()
    kl = float((chance_R * (logp_RT - ref_RT).sum(dim=1)).sum())
    assert kl > 0.01
    assert float((chance_R * k3_kl(logp_RT, ref_RT).sum(dim=1)).sum()) == pytest.approx(kl, rel=EXACT)
    new_RTV, other_RTV = here.next_token_logp(policy)[0, 0], here.next_token_logp(reference)[0, 0]
    first_kl = (new_RTV.exp() * (new_RTV - other_RTV)).sum()
    for value_RT in (logp_RT - ref_RT, k3_kl(logp_RT, ref_RT)):
        assert float((chance_R * value_RT[:, 0]).sum()) == pytest.approx(float(first_kl.detach()), rel=EXACT)

"""Tables 4 to 7 of the exact-gradient report: KL terms, probability ratios, and the variants of the clipped loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.exact.comparison import relative_error
from benchmarks.exact.enumeration import (
    Estimator,
    World,
    arbitrary_rewards,
    gradient,
    moved,
    settings,
    table_policy,
    true_gradient,
    world,
)
from benchmarks.exact.table import AGGREGATIONS, COMPARED, Cell, Table, compared, language
from grpo_core.config import LOSSES
from grpo_core.objective import k3_kl
from sft_core.model.policy import Policy

DISTANCES = (0.1, 0.5)  # noise on the logits between the policy that sampled and the one that learns


def sampled_kl(loss: Callable[[Tensor, Tensor], Tensor], here: World, policy: Policy, reference: Policy) -> Tensor:
    """Mean gradient of a token loss of (logp, ref_logp), summed over a completion: for formulas the project lacks."""
    logp_RT, ref_RT = here.logp(policy), here.logp(reference).detach()
    chance_R = logp_RT.detach().sum(dim=1).exp()
    return gradient((chance_R * loss(logp_RT, ref_RT).sum(dim=1)).sum(), policy)


@dataclass(frozen=True)
class KLGradients:
    """True gradients of the three KLs that a KL term might estimate."""

    sequence: Tensor  # KL(pi_theta || pi_ref) of whole completions
    reverse: Tensor  # KL(pi_theta || pi_ref) of the next token at each visited prefix, the visits held fixed
    forward: Tensor  # KL(pi_ref || pi_theta) of the next token, likewise


def kl_gradients(here: World, policy: Policy, reference: Policy, visitor: Policy | None = None) -> KLGradients:
    """Prefixes count as often as `visitor` comes by (the policy itself where None)."""
    chance_R = here.chance(policy)
    logp_R, ref_R = here.logp(policy).sum(dim=1), here.logp(reference).sum(dim=1).detach()
    new_RTV, ref_RTV = here.next_token_logp(policy), here.next_token_logp(reference).detach()
    # A prefix is in as many rows as there are completions of it; their probabilities add up to the prefix's own.
    visits_RT = here.chance(visitor or policy).detach()[:, None] * here.mask_RT
    reverse_RT = (new_RTV.exp() * (new_RTV - ref_RTV)).sum(dim=-1)
    forward_RT = (ref_RTV.exp() * (ref_RTV - new_RTV)).sum(dim=-1)
    return KLGradients(
        gradient((chance_R * (logp_R - ref_R)).sum(), policy),
        gradient((visits_RT * reverse_RT).sum(), policy),
        gradient((visits_RT * forward_RT).sum(), policy),
    )


def kl_term(here: World, reference: Policy, sampler: Policy | None = None, **fields: Any) -> Estimator:
    """The project's KL term alone: rewards 0, beta 1, G = 2."""
    config = settings(here.budget, 2, beta=1.0, **fields)
    return Estimator(here, config, torch.zeros(len(here.rows), dtype=torch.float64), sampler, reference)


def kl_as_reward(here: World, policy: Policy, reference: Policy) -> Estimator:
    """log pi_ref - log pi_theta of the completion as its reward, G = 2."""
    reward_R = (here.logp(reference) - here.logp(policy)).sum(dim=1).detach()
    return Estimator(here, settings(here.budget, 2), reward_R)


def kl_losses() -> Table:
    """Block 4."""
    here, policy = language()
    reference, sampler = moved(policy, 0.7, seed=5), moved(policy, 0.5, seed=6)
    true, visited = kl_gradients(here, policy, reference), kl_gradients(here, policy, reference, sampler)
    k1 = sampled_kl(lambda logp, ref: logp - ref, here, policy, reference)
    k2 = sampled_kl(lambda logp, ref: (logp - ref).square() / 2, here, policy, reference)
    k3 = -kl_term(here, reference).direction(policy)
    corrected = -kl_term(here, reference, kl_correction=True).direction(policy)
    mean = -kl_term(here, reference, aggregation="token_mean").direction(policy)
    mean_corrected = -kl_term(here, reference, aggregation="token_mean", kl_correction=True).direction(policy)
    off = -kl_term(here, reference, sampler).direction(policy)
    off_corrected = -kl_term(here, reference, sampler, kl_correction=True).direction(policy)
    in_reward = -kl_as_reward(here, policy, reference).direction(policy)
    whole, at_prefixes = "KL(policy, ref) of completions", "KL(policy, ref) at each prefix"
    forwards = "KL(ref, policy) at each prefix"
    lines = [
        compared("k1 as a loss", whole, k1, true.sequence, 0.0),
        compared("k2 as a loss", at_prefixes, k2, true.reverse, 1.0),
        compared("k3 as a loss", forwards, k3, true.forward, 1.0),
        compared("k3 as a loss", at_prefixes, k3, true.reverse),
        compared("k3 as a loss", whole, k3, true.sequence),
        compared("k3 times the ratio", at_prefixes, corrected, true.reverse, 1.0),
        compared("k3 times the ratio", whole, corrected, true.sequence),
        compared("k3, token_mean", forwards, mean, true.forward),
        compared("k3 times the ratio, token_mean", at_prefixes, mean_corrected, true.reverse),
        compared("k3, off-policy", forwards, off, visited.forward),
        compared("k3 times the ratio, off-policy", at_prefixes, off_corrected, visited.reverse, 1.0),
        compared("minus k1 of the completion as reward, G = 2", whole, in_reward, true.sequence, 0.5),
    ]
    says = (
        "Summed over tokens unless it says token_mean; on-policy unless it says otherwise. k1 has no mean gradient. "
        "k3 pulls with KL(ref, policy), k3 times the ratio (token for token k2's gradient) with KL(policy, ref): of "
        "the next token, at the prefixes that the sampler visits, as if their frequencies were fixed. Only a KL in "
        "the reward sees that the policy chooses its prefixes too. Weights that depend on lengths correlate with the "
        "tokens, and neither reading is exact; off-policy k3 needs the ratio."
    )
    return Table("4. Gradients of KL terms", COMPARED, lines, says)


def kl_values() -> Table:
    """Block 5."""
    lines: list[tuple[Cell, ...]] = []
    for name, here, policy in (("one token", world(4, 1), table_policy(4, 1)), ("a completion", *language())):
        reference = moved(policy, 0.7, seed=5)
        logp_RT, ref_RT = here.logp(policy).detach(), here.logp(reference).detach()
        chance_R = logp_RT.sum(dim=1).exp()
        new_RTV, other_RTV = here.next_token_logp(policy).detach(), here.next_token_logp(reference).detach()
        kl_RT = (new_RTV.exp() * (new_RTV - other_RTV)).sum(dim=-1) * here.mask_RT
        kl = float((chance_R[:, None] * kl_RT).sum())
        k2_RT = (logp_RT - ref_RT).square() / 2
        for kind, value_RT in (("k1", logp_RT - ref_RT), ("k2", k2_RT), ("k3", k3_kl(logp_RT, ref_RT))):
            value_R = value_RT.sum(dim=1)
            mean = float((chance_R * value_R).sum())
            spread = float((chance_R * (value_R - mean).square()).sum().sqrt())
            lines.append((f"{kind}, {name}", kl, mean, mean - kl, spread))
    columns = ("estimate", "true KL(policy, ref)", "mean", "bias", "standard deviation")
    says = "In nats. k1 and k3 are unbiased estimates of the KL, of one token and summed over a completion; k2 is not."
    return Table("5. Values of KL estimates", columns, lines, says)


FREE = {"epsilon_low": 1.0, "epsilon_high": 1e9}  # bounds that bind nothing
# VESPO's phi(W) = W^k * exp(lambda * (1 - W)) made W itself
_W_ITSELF = {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.0, "vespo_k_neg": 1.0, "vespo_lambda_neg": 0.0}
WHOLE_RATIO = {"token_loss": "vespo"} | _W_ITSELF
OFF_POLICY: dict[str, dict[str, Any]] = {
    "ratio of the completion": WHOLE_RATIO,
    "ratio of each token": FREE,
    "geometric mean (GSPO)": {"ratio_level": "sequence"} | FREE,
    "ratio of each token, clipped at 0.2": {},
    "geometric mean, clipped (GSPO)": {"ratio_level": "sequence", "epsilon_low": 3e-4, "epsilon_high": 4e-4},
    "CISPO, bounded at 1.2": {"token_loss": "cispo"},
    "SAPO": {"token_loss": "sapo"},
    "VESPO": {"token_loss": "vespo"},
}


def off_policy() -> Table:
    """Block 6."""
    here, policy = language()
    short, single = world(4, 1), table_policy(4, 1)
    of, lines = "expected reward", []
    for distance in DISTANCES:
        name, reward_R = f"noise {distance}: ", arbitrary_rewards(4)
        truth, sampler = true_gradient(short, single, reward_R), moved(single, distance)
        direction = Estimator(short, settings(1, 2, **FREE), reward_R, sampler).direction(single)
        lines.append(compared(name + "ratio, one-token completions", of, direction, truth, 0.5))
        reward_R = arbitrary_rewards(len(here.rows))
        truth, sampler = true_gradient(here, policy, reward_R), moved(policy, distance)
        for kind, fields in OFF_POLICY.items():
            direction = Estimator(here, settings(3, 2, **fields), reward_R, sampler).direction(policy)
            lines.append(compared(name + kind, of, direction, truth, 0.5 if fields == WHOLE_RATIO else ""))
    apart = [kl_between(moved(policy, distance), policy) for distance in DISTANCES]
    says = (
        "Samples of another policy, G = 2, unscaled, summed over tokens. Only the probability ratio of the whole "
        "completion is unbiased (here: VESPO with k 1 and lambda 0); a token's own ratio is where completions have "
        "one token. Clipping adds a bias of its own, GSPO's narrow bounds the largest here. The two policies are "
        f"{apart[0]:.4f} and {apart[1]:.4f} nats a completion apart, KL(sampler, learner)."
    )
    return Table("6. Off-policy", COMPARED, lines, says)


def kl_between(first: Policy, second: Policy) -> float:
    """KL(first || second) of completions of `language`, in nats."""
    here = language()[0]
    difference_R = (here.logp(first) - here.logp(second)).sum(dim=1)
    return float((here.chance(first) * difference_R).sum().detach())


def variants() -> Table:
    """Block 7."""
    here, policy = language()
    reward_R = arbitrary_rewards(len(here.rows))
    lines: list[tuple[Cell, ...]] = []
    for token_loss in ("clip", "cispo", "sapo", "vespo"):
        for level in ("token", "sequence"):
            differences = []
            for aggregation in AGGREGATIONS:
                base = settings(3, 3, aggregation=aggregation)
                clip = Estimator(here, base, reward_R).direction(policy)
                kind = replace(base, token_loss=token_loss, ratio_level=level)
                differences.append(relative_error(Estimator(here, kind, reward_R).direction(policy), clip))
            names = [
                name for name, loss in LOSSES.items() if (loss.token_loss, loss.ratio_level) == (token_loss, level)
            ]
            lines.append((f"{token_loss}, {level} level", ", ".join(names), max(differences)))
    says = (
        "The largest relative difference under any of the four weights, G = 3. While the policy is the one that "
        "sampled, all losses have one gradient: they differ in what they do after the first update."
    )
    return Table("7. Variants on-policy", ("token loss", "names", "difference from the clipped one"), lines, says)

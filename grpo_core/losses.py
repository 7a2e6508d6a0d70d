"""What the settings make of the objective's parts: where the options of `grpo_core.config` meet the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.sampling import Samples
from grpo_core.advantages import decoupled_advantages, group_advantages
from grpo_core.config import GRPOConfig
from grpo_core.objective import clipped_surrogate, k3_kl
from grpo_core.rollout import Rollout
from grpo_core.variants import cispo, high_entropy_tokens, near_policy_rows, sapo, vespo
from sft_core.logprobs import scored
from sft_core.policy import Policy
from sft_core.rows import Rows


def advantages(rollout: Rollout, config: GRPOConfig) -> Tensor:
    """advantage_BG, by one of the two orders of adding up reward functions and normalising."""
    if config.reward_aggregation == "sum_then_normalize":
        return group_advantages(rollout.reward_BG, config.scale_rewards)
    scores = rollout.scores
    weight_K = torch.tensor([scores.weights.get(name, 1.0) for name in scores.by_function], dtype=torch.float64)
    return decoupled_advantages(rollout.value_KBG, weight_K)


def learned_rows(samples: Samples, config: GRPOConfig) -> Rows:
    """The rows that teach: all of them, or with `mask_truncated` those that the model ended itself (DAPO, arXiv
    2503.14476, section 3.4). A row left out keeps its place, with no completion token."""
    return samples.rows.without_completions(samples.truncated_N) if config.mask_truncated else samples.rows


def kept_tokens(policy: Policy, rows: Rows, config: GRPOConfig) -> Tensor:
    """mask_NT of the tokens that the advantage acts on: all of the completions, or their `top_entropy` share.

    Which tokens those are is decided once, over the whole step, under the policy that sampled them. TRL decides anew
    in each micro-batch of each update (grpo_trainer.py 1.16.0, line 3050), so that its gradient depends on their size.
    """
    if config.top_entropy == 1:
        return rows.mask_NT
    _, entropy_NT = scored(policy, rows, config.temperature, config.micro_batch, entropy="value")
    return high_entropy_tokens(entropy_NT, rows.mask_NT, config.top_entropy)


def token_advantages(advantage_BG: Tensor, kept_NT: Tensor, dtype: torch.dtype) -> Tensor:
    """A_i,t: one for all kept tokens of a completion, 0 elsewhere."""
    return advantage_BG.flatten()[:, None].to(dtype).to(kept_NT.device) * kept_NT


def policy_loss(
    ratio: Tensor, logp_NT: Tensor, old_logp_NT: Tensor, mask_NT: Tensor, advantage_NT: Tensor, config: GRPOConfig
) -> Tensor:
    """What each token contributes before its weight and its KL; the clipped surrogate unless --loss says otherwise."""
    kind = config.objective.token_loss
    if kind == "clip":
        delta = config.delta or float("inf")
        loss_NT = clipped_surrogate(ratio, advantage_NT, config.epsilon_low, config.epsilon_high, delta)
    elif kind == "cispo":
        loss_NT = cispo(ratio, logp_NT, advantage_NT, config.epsilon_high)
    elif kind == "sapo":
        loss_NT = sapo(ratio, advantage_NT, config.sapo_temperature_pos, config.sapo_temperature_neg)
    else:
        positive = (config.vespo_k_pos, config.vespo_lambda_pos)
        negative = (config.vespo_k_neg, config.vespo_lambda_neg)
        loss_NT = vespo(logp_NT, old_logp_NT, advantage_NT, positive, negative)
    if config.off_policy_threshold:
        loss_NT = loss_NT * near_policy_rows(logp_NT, old_logp_NT, mask_NT, advantage_NT, config.off_policy_threshold)
    return loss_NT


def kl_penalty(ratio: Tensor, logp_NT: Tensor, ref_logp_NT: Tensor, config: GRPOConfig) -> Tensor:
    """k3 of each token.

    On-policy its mean gradient is that of KL(pi_ref || pi_theta) over the next token, at each prefix that was sampled.
    With `kl_correction` it is multiplied by the ratio; a token's own ratio has a gradient that turns it into that of
    KL(pi_theta || pi_ref), also where the ratio's value is 1, and keeps it so off-policy (DeepSeek-V3.2, arXiv
    2512.02556, eq. 7; TRL's default, grpo_trainer.py 1.16.0, line 3105). Neither counts that the policy chooses its own
    prefixes, and both are exact only under weights that do not depend on lengths: benchmarks/results/exact-gradient.md,
    block 4.
    """
    kl_NT = k3_kl(logp_NT, ref_logp_NT)
    return kl_NT * ratio if config.kl_correction else kl_NT

"""What published successors changed in the objective, each as a function of tensors. Nothing here runs by default.

Where each stands in the loss is decided in `grpo_core.step`. `ratio` is (N, T) or,
at the sequence level, (N, 1). Log-probabilities are 0 on padding, and weights are too, so no function masks its result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from eval.samples import Samples
from grpo_core.config import GRPOConfig
from grpo_core.objective import group_advantages
from rewards import Scores
from sft_core.learn.rows import Rows, Tokens
from sft_core.learn.scored import scored
from sft_core.model.policy import Policy

ENTROPY_ROUNDING = 3e-6  # nats: several roundings of a float32 log-probability


def token_loss(ratio: Tensor, logp_NT: Tensor, old_logp_NT: Tensor, advantage_NT: Tensor, config: GRPOConfig) -> Tensor:
    """What each token contributes under CISPO, SAPO or VESPO, with the settings' constants."""
    if config.objective.token_loss == "cispo":
        return cispo(ratio, logp_NT, advantage_NT, config.epsilon_high)
    if config.objective.token_loss == "sapo":
        return sapo(ratio, advantage_NT, config.sapo_temperature_pos, config.sapo_temperature_neg)
    positive = (config.vespo_k_pos, config.vespo_lambda_pos)
    negative = (config.vespo_k_neg, config.vespo_lambda_neg)
    return vespo(logp_NT, old_logp_NT, advantage_NT, positive, negative)


def cispo(ratio: Tensor, logp_NT: Tensor, advantage_NT: Tensor, epsilon_high: float) -> Tensor:
    """-stopgrad(min(ratio, 1 + epsilon_high)) * A * log pi_theta (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    REINFORCE with a bounded importance weight: unlike in the clipped surrogate, no token ever loses its gradient. The
    paper uses no lower bound. TRL bounds the weight by epsilon_high itself (grpo_trainer.py 1.16.0, line 3110).

    >>> ratio, logp_NT = torch.tensor([[0.5, 1.0, 4.0]]), torch.tensor([[-1.0, -1.0, -1.0]])
    >>> cispo(ratio, logp_NT, torch.tensor([[1.0]]), epsilon_high=1.0)
    tensor([[0.5000, 1.0000, 2.0000]])
    """
    return -ratio.clamp(max=1 + epsilon_high).detach() * advantage_NT * logp_NT


def sapo(ratio: Tensor, advantage_NT: Tensor, temperature_pos: float, temperature_neg: float) -> Tensor:
    """-sigmoid(tau * (ratio - 1)) * 4 / tau * A (SAPO, arXiv 2511.20347, eq. 5 and 6): a gate that closes smoothly on
    both sides of ratio 1, where its slope is that of the ratio. tau is one constant for A > 0 and another otherwise.

    >>> sapo(torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0]]), 1.0, 1.05)
    tensor([[-1.0758, -2.0000, -2.9242]])
    """
    tau_NT = torch.full_like(advantage_NT, temperature_neg).masked_fill(advantage_NT > 0, temperature_pos)
    return -torch.sigmoid(tau_NT * (ratio - 1)) * 4 / tau_NT * advantage_NT


def vespo(
    logp_NT: Tensor,
    old_logp_NT: Tensor,
    advantage_NT: Tensor,
    positive: tuple[float, float] = (2.0, 3.0),
    negative: tuple[float, float] = (3.0, 2.0),
) -> Tensor:
    """-stopgrad(phi(W)) * A * log pi_theta with phi(W) = W^k * exp(lambda * (1 - W)) (VESPO, arXiv 2602.10693).

    W is the ratio of the whole completion's probabilities, the product of its tokens' ratios; phi is 1 at W = 1, has
    its peak at k / lambda and falls to 0 on both sides of that. (k, lambda) is `positive` for A >= 0 and `negative`
    otherwise. The bounds on log W are TRL's (grpo_trainer.py 1.16.0, lines 2972-3018): +-20 a token, log 1e-8 to 20 a
    completion.

    >>> old_NT, new_NT = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -0.5]])
    >>> vespo(old_NT, old_NT, torch.tensor([[1.0]]))
    tensor([[1., 1.]])
    >>> vespo(new_NT, old_NT, torch.tensor([[1.0]]))
    tensor([[0.3882, 0.1941]])
    """
    with torch.no_grad():
        log_w_N1 = (logp_NT - old_logp_NT).clamp(-20, 20).sum(dim=1, keepdim=True).clamp(math.log(1e-8), 20)
        good_NT = advantage_NT >= 0
        k_NT = torch.full_like(advantage_NT, negative[0]).masked_fill(good_NT, positive[0])
        lambda_NT = torch.full_like(advantage_NT, negative[1]).masked_fill(good_NT, positive[1])
        phi_NT = (lambda_NT + k_NT * log_w_N1 - lambda_NT * log_w_N1.exp()).exp()
    return -phi_NT * advantage_NT * logp_NT


def high_entropy_tokens(entropy_NT: Tensor, mask_NT: Tensor, share: float) -> Tensor:
    """True on the `share` of the completions' tokens where the policy was least sure, the forks of the reasoning
    ("Beyond the 80/20 rule", arXiv 2506.01939): those of at least the (1 - share) quantile of the entropies.

    >>> entropy_NT = torch.tensor([[0.1, 2.0, 0.3, 0.2], [1.0, 0.0, 0.0, 0.0]])
    >>> mask_NT = torch.tensor([[True, True, True, True], [True, False, False, False]])
    >>> high_entropy_tokens(entropy_NT, mask_NT, share=0.4)
    tensor([[False,  True, False, False],
            [ True, False, False, False]])
    """
    if not mask_NT.any():
        return mask_NT
    ordered = entropy_NT[mask_NT].sort().values
    # torch.quantile's linear interpolation, without its limit of 2**24 values
    place = (1 - share) * (len(ordered) - 1)
    below = ordered[math.floor(place)]
    bound = below + (ordered[math.ceil(place)] - below) * (place - math.floor(place))
    # The first tokens of a group are drawn from one distribution, so their entropies are equal but for rounding, which
    # depends on the micro-batch; without the margin it would decide which of them are kept.
    return mask_NT & (entropy_NT >= bound - ENTROPY_ROUNDING)


def corrected_kl(kl_NT: Tensor, ratio: Tensor) -> Tensor:
    """k3 times the ratio (DeepSeek-V3.2, arXiv 2512.02556, eq. 7; TRL's default, grpo_trainer.py 1.16.0, line 3105).

    On-policy, k3's own mean gradient is that of KL(pi_ref || pi_theta) over the next token, at each prefix that was
    sampled. A token's own ratio has a gradient that turns it into that of KL(pi_theta || pi_ref), also where the
    ratio's value is 1, and keeps it so off-policy. Neither counts that the policy chooses its own prefixes, and both
    are exact only under weights that do not depend on lengths: benchmarks/results/exact-gradient.md, block 4.
    """
    return kl_NT * ratio


def near_policy_rows(
    logp_NT: Tensor, old_logp_NT: Tensor, mask_NT: Tensor, advantage_NT: Tensor, threshold: float
) -> Tensor:
    """1 where A >= 0 or the policy has moved by no more than `threshold` nats a token since the row was sampled, else 0
    (DeepSeek-V3.2, arXiv 2512.02556, eq. 9): what has become unlikely is not pushed down further. No gradient.

    >>> old_NT, new_NT = torch.tensor([[-1.0], [-1.0]]), torch.tensor([[-3.0], [-3.0]])
    >>> near_policy_rows(new_NT, old_NT, torch.ones(2, 1), torch.tensor([[1.0], [-1.0]]), 0.5)
    tensor([[1.],
            [0.]])
    """
    drift_NT = old_logp_NT - logp_NT.detach()
    drift_N1 = drift_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
    return ((advantage_NT >= 0) | (drift_N1 <= threshold)).to(logp_NT.dtype)


def sampler_correction(old_logp_NT: Tensor, sampler_logp_NT: Tensor, mask_NT: Tensor, mode: str, cap: float) -> Tensor:
    """The policy's probability of each token, or with `sequence_` of each completion, over the sampler's: the
    importance weight of what another program drew with the same weights. `_truncate`: at most `cap`; `_mask`: 0 above
    it. TRL's `vllm_importance_sampling_mode` and `_clip_max` (grpo_trainer.py 1.16.0, lines 2660-2703; its default is
    sequence_mask); 1 where the sampler has no number. (N, T), or (N, 1) for whole completions; no gradient.

    >>> old_NT, sampler_NT = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
    >>> sampler_correction(old_NT, sampler_NT, torch.ones(1, 2), "token_truncate", 3.0)
    tensor([[1., 3.]])
    """
    drift_NT = torch.nan_to_num((old_logp_NT - sampler_logp_NT) * mask_NT, nan=0.0)
    ratio = (drift_NT.sum(dim=1, keepdim=True) if mode.startswith("sequence") else drift_NT).exp()
    return ratio.clamp(max=cap) if mode.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)


def ended_rows(samples: Samples) -> Rows:
    """The rows to learn from: those that the model ended itself (DAPO, arXiv 2503.14476, section 3.4). A row left out
    keeps its place, with no completion token."""
    return samples.rows.without_completions(samples.truncated_N)


def kept_tokens(policy: Policy, rows: Rows, config: GRPOConfig, micro_batch: int | Tokens) -> Tensor:
    """mask_NT of the tokens that the advantage acts on: the completions' `top_entropy` share.

    Which tokens those are is decided once, over the whole step, under the policy that sampled them. TRL decides again
    in each micro-batch of each update (grpo_trainer.py 1.16.0, line 3050), so that its gradient depends on their size.
    """
    _, entropy_NT = scored(policy, rows, config.temperature, micro_batch, entropy="value")
    return high_entropy_tokens(entropy_NT, rows.mask_NT, config.top_entropy)


def values_and_weights(scores: Scores, reward_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Each of K reward functions' values before its weight, value_KBG (NaN: no opinion), and weight_K. float64, on the
    CPU."""
    values = [
        [torch.nan if value is None else value for value in of_function] for of_function in scores.by_function.values()
    ]
    value_KBG = torch.tensor(values, dtype=torch.float64).view(-1, *reward_BG.shape)
    return value_KBG, torch.tensor([scores.weights.get(name, 1.0) for name in scores.by_function], dtype=torch.float64)


def decoupled_advantages(value_KBG: Tensor, weight_K: Tensor) -> Tensor:
    """Normalise each of K reward functions within its groups, add them up, normalise over the batch (GDPO, arXiv
    2601.05242; TRL's `normalize_then_sum`): a function with a small standard deviation counts as much as
    one with a large one.

    NaN (no opinion) is left out of every mean and sum; a completion without any opinion gets advantage 0.

    Args:
        value_KBG: each function's values before its weight.

    >>> large, small = [[0.0, 10.0, 0.0, 10.0]], [[0.0, 0.0, 0.1, 0.1]]
    >>> decoupled_advantages(torch.tensor([large, small]), torch.tensor([1.0, 1.0])).round(decimals=2)
    tensor([[-1.2200,  0.0000, -0.0000,  1.2200]])
    """
    K, B, G = value_KBG.shape
    score_KBG = group_advantages(value_KBG.reshape(K * B, G)).view(K, B, G) * weight_K[:, None, None]
    unknown_BG = value_KBG.isnan().all(dim=0)
    total_BG = torch.where(unknown_BG, torch.nan, score_KBG.sum(dim=0))
    return group_advantages(total_BG.view(1, B * G)).view(B, G)

"""The mathematics of GRPO as functions of tensors: advantages, token weights, ratio, clipped surrogate, KL estimator.

What is minimised on a step's N rows (DeepSeekMath, arXiv 2402.03300, equation 3, with the sign flipped):

    loss = sum over rows n and tokens t of  weight_nt * ( surrogate_nt + beta * kl_nt )

The weights hold every normalisation and are computed once for the whole step, so the gradients of its micro-batches
add up to the same sum, however it is cut into them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grpo_core.config import Aggregation, RatioLevel

# Bounds the quotient of a tiny standard deviation; the size is TRL's (grpo_trainer.py, 1.16.0, lines 2750-2818).
EPSILON = 1e-4


def group_advantages(reward_BG: Tensor, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """A = (r - mean of its group) / standard deviation: that of its group, of the whole batch, or 1.

    The mean is the baseline: it lowers the gradient's variance and leaves its expectation unchanged, up to the factor
    (G - 1) / G, because a completion is part of its own baseline. Dividing by the group's standard deviation (over
    n - 1) is a bias, which Dr. GRPO (arXiv 2503.20783) avoids with `none`: prompts whose rewards differ little gain
    weight (benchmarks/results/exact-gradient.md, block 2).

    A reward that is NaN (no reward function had an opinion) counts in no mean and gets advantage 0. A group of equal
    rewards gets exactly 0: decided by max == min, because the rounded mean of twelve 0.01s is not 0.01.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]))
    tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scale="none")
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    centered_BG = reward_BG - reward_BG.nanmean(dim=1, keepdim=True)
    centered_BG = torch.where(all_equal(reward_BG)[:, None], 0.0, centered_BG)
    if scale == "group":
        centered_BG = centered_BG / (nan_std(reward_BG) + EPSILON)
    elif scale == "batch":
        centered_BG = centered_BG / (nan_std(reward_BG.flatten()[None]) + EPSILON)
    return torch.where(centered_BG.isnan(), 0.0, centered_BG)


def all_equal(reward_BG: Tensor) -> Tensor:
    """True for the groups that teach nothing: all their rewards are equal, or fewer than two are known."""
    known_BG = ~reward_BG.isnan()
    highest_B = torch.where(known_BG, reward_BG, -torch.inf).amax(dim=1)
    lowest_B = torch.where(known_BG, reward_BG, torch.inf).amin(dim=1)
    return highest_B <= lowest_B


def nan_std(values: Tensor) -> Tensor:
    """Standard deviation of each row of a matrix over n - 1, leaving NaNs out, as a column; NaN below two values."""
    known = ~values.isnan()
    deviation = torch.where(known, values - values.nanmean(dim=1, keepdim=True), 0.0)
    freedom = (known.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    return (deviation.square().sum(dim=1, keepdim=True) / freedom).sqrt()


def token_advantages(advantage_BG: Tensor, kept_NT: Tensor, dtype: torch.dtype) -> Tensor:
    """A_i,t: one for all kept tokens of a completion, 0 elsewhere."""
    return advantage_BG.flatten()[:, None].to(dtype).to(kept_NT.device) * kept_NT


def token_weights(mask_NT: Tensor, aggregation: Aggregation, max_completion_tokens: int) -> Tensor:
    """The share of each token in the loss; 0 on padding.

    sequence_mean     1 / (N * row's length)         GRPO, arXiv 2402.03300: every completion has the same weight, so
                                                     tokens of long ones have less
    token_mean        1 / (tokens in the step)       DAPO, arXiv 2503.14476: every token has the same
    constant_length   1 / (N * completion budget)    Dr. GRPO, arXiv 2503.20783: independent of lengths
    sequence_sum      1 / N                          LUSPO, arXiv 2602.05261: the same without the constant

    >>> mask_NT = torch.tensor([[True, True, True, True], [True, False, False, False]])
    >>> token_weights(mask_NT, "sequence_mean", 8)
    tensor([[0.1250, 0.1250, 0.1250, 0.1250],
            [0.5000, 0.0000, 0.0000, 0.0000]])
    """
    N = mask_NT.shape[0]
    if aggregation == "sequence_mean":
        return mask_NT / (N * mask_NT.sum(dim=1, keepdim=True).clamp(min=1))
    if aggregation == "token_mean":
        return mask_NT / mask_NT.sum().clamp(min=1)
    if aggregation == "constant_length":
        return mask_NT / (N * max_completion_tokens)
    return mask_NT / N


def importance_ratio(logp_NT: Tensor, old_logp_NT: Tensor, mask_NT: Tensor, level: RatioLevel = "token") -> Tensor:
    """pi_theta / pi_old: how much more likely a token, or a completion, is now than when it was sampled.

    token      (N, T): each token's own. Both log-probabilities are 0 on padding, so it is 1 there.
    sequence   (N, 1): the geometric mean over the completion's tokens (GSPO, arXiv 2507.18071, eq. 7).
    """
    log_ratio_NT = logp_NT - old_logp_NT
    if level == "sequence":
        log_ratio_NT = log_ratio_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
    return log_ratio_NT.exp()


def clipped_surrogate(
    ratio: Tensor, advantage_NT: Tensor, epsilon_low: float, epsilon_high: float, delta: float = float("inf")
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A) of each token (PPO, arXiv 1707.06347, eq. 7).

    The gain from making a good token more likely ends at 1 + epsilon_high, that from making a bad one less likely at
    1 - epsilon_low; a move in the wrong direction is never clipped, unless `delta` bounds the ratio there too
    (INTELLECT-2, arXiv 2505.07291). Separate bounds: DAPO, arXiv 2503.14476, eq. 10. `ratio` is (N, T) or (N, 1).

    >>> clipped_surrogate(torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[1.0]]), 0.2, 0.2)
    tensor([[-0.5000, -1.0000, -1.2000]])
    >>> clipped_surrogate(torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[-1.0]]), 0.2, 0.2)
    tensor([[0.8000, 1.0000, 2.0000]])
    >>> clipped_surrogate(torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[-1.0]]), 0.2, 0.2, delta=1.5)
    tensor([[0.8000, 1.0000, 1.5000]])
    """
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.minimum(ratio.clamp(max=delta) * advantage_NT, clipped * advantage_NT)


def k3_kl(logp_NT: Tensor, ref_logp_NT: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi_theta: an estimate of KL(pi_theta || pi_ref) that is unbiased for
    tokens sampled from pi_theta, never negative, and 0 where the two agree (DeepSeekMath eq. 4; k3 of Schulman's
    "Approximating KL Divergence", 2020).

    >>> k3_kl(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, 0.0]))
    tensor([0.0000, 0.3679, 0.7183])
    """
    difference_NT = ref_logp_NT - logp_NT
    return difference_NT.exp() - difference_NT - 1

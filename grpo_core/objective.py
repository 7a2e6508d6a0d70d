"""The objective of GRPO as functions of tensors: ratio, clipped surrogate, KL estimator, and the weight of each token.

What is minimised on a step's N rows (DeepSeekMath, arXiv 2402.03300, equation 3, with the sign turned):

    loss = sum over rows n and tokens t of  weight_nt * ( surrogate_nt + beta * kl_nt )

The weights hold every normalisation and are computed once for the whole step, so the micro-batches it is cut into add
up to the same gradient however they are cut.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sequence_mean", "token_mean", "constant_length"]


def token_weights(mask_NT: Tensor, aggregation: Aggregation, max_completion_tokens: int) -> Tensor:
    """The share of each token in the loss; 0 on padding.

    sequence_mean     1 / (N * row's length)         GRPO, arXiv 2402.03300: every completion counts alike, so tokens of
                                                     long ones count less
    token_mean        1 / (tokens in the step)       DAPO, arXiv 2503.14476: every token counts alike
    constant_length   1 / (N * completion budget)    Dr. GRPO, arXiv 2503.20783: alike, and independent of lengths

    >>> mask_NT = torch.tensor([[True, True, True, True], [True, False, False, False]])
    >>> token_weights(mask_NT, "sequence_mean", 8)
    tensor([[0.1250, 0.1250, 0.1250, 0.1250],
            [0.5000, 0.0000, 0.0000, 0.0000]])
    >>> token_weights(mask_NT, "token_mean", 8)
    tensor([[0.2000, 0.2000, 0.2000, 0.2000],
            [0.2000, 0.0000, 0.0000, 0.0000]])
    """
    N = mask_NT.shape[0]
    if aggregation == "sequence_mean":
        return mask_NT / (N * mask_NT.sum(dim=1, keepdim=True).clamp(min=1))
    if aggregation == "token_mean":
        return mask_NT / mask_NT.sum().clamp(min=1)
    return mask_NT / (N * max_completion_tokens)


def importance_ratio(logp_NT: Tensor, old_logp_NT: Tensor) -> Tensor:
    """pi_theta / pi_old of each token: how much likelier it is now than when it was sampled.

    Both are 0 on padding (`sft_core.logprobs`), so the ratio is 1 there and nothing overflows.
    """
    return (logp_NT - old_logp_NT).exp()


def clipped_surrogate(ratio_NT: Tensor, advantage_N: Tensor, epsilon_low: float, epsilon_high: float) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A) of each token (PPO, arXiv 1707.06347, eq. 7).

    The gain from making a good token likelier ends at 1 + epsilon_high, that from making a bad one rarer at
    1 - epsilon_low; a move in the wrong direction is never clipped. Separate bounds: DAPO, arXiv 2503.14476, eq. 10.

    >>> clipped_surrogate(torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([1.0]), 0.2, 0.2)
    tensor([[-0.5000, -1.0000, -1.2000]])
    >>> clipped_surrogate(torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([-1.0]), 0.2, 0.2)
    tensor([[0.8000, 1.0000, 2.0000]])
    """
    clipped_NT = ratio_NT.clamp(1 - epsilon_low, 1 + epsilon_high)
    advantage_N1 = advantage_N[:, None]
    return -torch.minimum(ratio_NT * advantage_N1, clipped_NT * advantage_N1)


def k3_kl(logp_NT: Tensor, ref_logp_NT: Tensor) -> Tensor:
    """exp(d) - d - 1 with d = log pi_ref - log pi_theta: an estimate of KL(pi_theta || pi_ref) that is unbiased for
    tokens sampled from pi_theta, never negative, and 0 where the two agree (DeepSeekMath eq. 4; k3 of Schulman's
    "Approximating KL Divergence", 2020).

    >>> k3_kl(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -2.0, 0.0]))
    tensor([0.0000, 0.3679, 0.7183])
    """
    difference_NT = ref_logp_NT - logp_NT
    return difference_NT.exp() - difference_NT - 1

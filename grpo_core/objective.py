"""The objective of GRPO as functions of tensors: ratio, clipped surrogate, KL estimator, and the weight of each token.

What is minimised on a step's N rows (DeepSeekMath, arXiv 2402.03300, equation 3, with the sign turned):

    loss = sum over rows n and tokens t of  weight_nt * ( surrogate_nt + beta * kl_nt )

The weights hold every normalisation and are computed once for the whole step, so the micro-batches it is cut into add
up to the same gradient however they are cut.

The published losses differ in three independent choices, and `LOSSES` names their combinations: whose ratio (the
token's or the sequence's), what a token contributes (`clipped_surrogate`, or one of `grpo_core.variants`), and what it
weighs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

RatioLevel = Literal["token", "sequence"]
TokenLoss = Literal["clip", "cispo", "sapo", "vespo"]
Aggregation = Literal["sequence_mean", "token_mean", "constant_length", "sequence_sum"]


class Loss(NamedTuple):
    """One choice of each kind."""

    ratio_level: RatioLevel
    token_loss: TokenLoss
    aggregation: Aggregation


# The names are TRL's (`loss_type`; grpo_trainer.py 1.16.0, lines 3083-3184), where GSPO is a setting instead of a name.
# A paper's further settings (epsilons, unscaled advantages) are flags of their own.
LOSSES: dict[str, Loss] = {
    "grpo": Loss("token", "clip", "sequence_mean"),  # DeepSeekMath, arXiv 2402.03300, eq. 3
    "bnpo": Loss("token", "clip", "token_mean"),  # TRL's name; equal to dapo here, where the batch is the whole step
    "dapo": Loss("token", "clip", "token_mean"),  # DAPO, arXiv 2503.14476, eq. 8
    "dr_grpo": Loss("token", "clip", "constant_length"),  # Dr. GRPO, arXiv 2503.20783, section 3.2 (scale_rewards none)
    "gspo": Loss("sequence", "clip", "sequence_mean"),  # GSPO, arXiv 2507.18071, eq. 5 (epsilons 3e-4 and 4e-4)
    "luspo": Loss("sequence", "clip", "sequence_sum"),  # LUSPO, arXiv 2602.05261: GSPO times each sequence's length
    "cispo": Loss("token", "cispo", "token_mean"),  # MiniMax-M1, arXiv 2506.13585, eq. 4
    "sapo": Loss("token", "sapo", "sequence_mean"),  # SAPO, arXiv 2511.20347, eq. 5
    "vespo": Loss("token", "vespo", "token_mean"),  # VESPO, arXiv 2602.10693
}


def token_weights(mask_NT: Tensor, aggregation: Aggregation, max_completion_tokens: int) -> Tensor:
    """The share of each token in the loss; 0 on padding.

    sequence_mean     1 / (N * row's length)         GRPO, arXiv 2402.03300: every completion counts alike, so tokens of
                                                     long ones count less
    token_mean        1 / (tokens in the step)       DAPO, arXiv 2503.14476: every token counts alike
    constant_length   1 / (N * completion budget)    Dr. GRPO, arXiv 2503.20783: alike, and independent of lengths
    sequence_sum      1 / N                          LUSPO, arXiv 2602.05261: the same without the constant

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
    if aggregation == "constant_length":
        return mask_NT / (N * max_completion_tokens)
    return mask_NT / N


def importance_ratio(logp_NT: Tensor, old_logp_NT: Tensor, mask_NT: Tensor, level: RatioLevel = "token") -> Tensor:
    """pi_theta / pi_old: how much likelier a token, or a completion, is now than when it was sampled.

    token      (N, T): each token's own ratio. Both log-probabilities are 0 on padding (`sft_core.logprobs`), so the
               ratio is 1 there and nothing overflows.
    sequence   (N, 1): the geometric mean over the completion's tokens, one ratio for all of them (GSPO, arXiv
               2507.18071, eq. 7). 1 where there is no token.
    """
    log_ratio_NT = logp_NT - old_logp_NT
    if level == "sequence":
        log_ratio_NT = log_ratio_NT.sum(dim=1, keepdim=True) / mask_NT.sum(dim=1, keepdim=True).clamp(min=1)
    return log_ratio_NT.exp()


def clipped_surrogate(
    ratio: Tensor, advantage_NT: Tensor, epsilon_low: float, epsilon_high: float, delta: float = float("inf")
) -> Tensor:
    """-min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A) of each token (PPO, arXiv 1707.06347, eq. 7).

    The gain from making a good token likelier ends at 1 + epsilon_high, that from making a bad one rarer at
    1 - epsilon_low; a move in the wrong direction is never clipped, unless `delta` bounds the ratio there too
    (INTELLECT-2, arXiv 2505.07291). Separate bounds: DAPO, arXiv 2503.14476, eq. 10.

    Args:
        ratio: (N, T), or (N, 1) for a whole completion's.

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

"""What published successors changed in the objective, each as a function of tensors. Nothing here runs by default.

Where a function stands in the loss is decided in one place, `policy_loss` in `grpo_core.losses`. `ratio` is (N, T) or,
at the sequence level, (N, 1). Log-probabilities are 0 on padding, and weights are too, so no function masks its result.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ENTROPY_ROUNDING = 3e-6  # nats: several roundings of a float32 log-probability


def cispo(ratio: Tensor, logp_NT: Tensor, advantage_NT: Tensor, epsilon_high: float) -> Tensor:
    """-stopgrad(min(ratio, 1 + epsilon_high)) * A * log pi_theta (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5).

    REINFORCE with a bounded importance weight: unlike the clipped surrogate, no token ever stops pulling. The paper has
    no lower bound in use. TRL bounds the weight by epsilon_high itself (grpo_trainer.py 1.16.0, line 3110).

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

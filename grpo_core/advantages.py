"""How much better than its group was a completion? (DeepSeekMath, arXiv 2402.03300, section 4.1.2)"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# Keeps a tiny spread from blowing up; the size is TRL's (grpo_trainer.py, 1.16.0, lines 2750-2818).
EPSILON = 1e-4


def group_advantages(reward_BG: Tensor, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """A = (r - mean of its group) / spread: the spread of its group, of the whole batch, or 1.

    The mean is the baseline: it lowers the variance of the gradient and leaves its direction alone, up to the factor
    (G - 1) / G, because a completion is part of its own baseline (exactly so under `constant_length` or `sequence_sum`
    weights). Dividing by the group's spread is a bias, which Dr. GRPO (arXiv 2503.20783) avoids with `none`: prompts
    whose rewards differ little gain on the others, and with rewards of 0 and 1 and G >= 4 those that are nearly always
    or nearly never solved (benchmarks/results/exact-gradient.md, block 2). Standard deviations are over n - 1.

    A reward that is NaN (no reward function had an opinion) is left out of means and spreads and gets advantage 0.
    A group whose rewards are all equal gets advantage exactly 0: decided by max == min, since the rounded mean of
    twelve 0.01s is not 0.01 and the quotient of two rounding errors is anything.

    Args:
        reward_BG: rewards of G completions for each of B prompts.

    Returns:
        advantage_BG: of the rewards' dtype.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]))
    tensor([[ 1.4997, -0.4999, -0.4999, -0.4999],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), scale="none")
    tensor([[ 0.7500, -0.2500, -0.2500, -0.2500]])
    """
    centered_BG = reward_BG - reward_BG.nanmean(dim=1, keepdim=True)
    centered_BG = torch.where(zero_spread(reward_BG)[:, None], 0.0, centered_BG)
    if scale == "group":
        centered_BG = centered_BG / (nan_std(reward_BG) + EPSILON)
    elif scale == "batch":
        centered_BG = centered_BG / (nan_std(reward_BG.flatten()[None]) + EPSILON)
    return torch.where(centered_BG.isnan(), 0.0, centered_BG)


def decoupled_advantages(value_KBG: Tensor, weight_K: Tensor) -> Tensor:
    """Normalise each of K reward functions within its groups, add them up, normalise over the batch (GDPO, arXiv
    2601.05242; TRL's `normalize_then_sum`): a function of small spread counts as much as one of large.

    NaN, no opinion, counts in no mean and no sum; a completion on which no function had one gets advantage 0.

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


def zero_spread(reward_BG: Tensor) -> Tensor:
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

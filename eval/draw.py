"""Drawing the next token: one pass over the vocabulary for its weights, and then only a block of it.

`generate` draws with `torch.multinomial`, which takes a random number for each word of the vocabulary. Here a
completion has one for each of its tokens, drawn before it begins: a row's tokens do not depend on the rows beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from eval.samples import Sampling

BLOCK = 512  # words


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token from softmax(logits / temperature), less what `cuts` cut off, and marks it, for
    `generate` to take the highest score. Keeps its log-probability before the cuts, and no logits.

    Nothing can be drawn from logits that are NaN: such a row ends there, and `Optimizer`, where the learner finds the
    same, skips the step and names the row.
    """

    def __init__(
        self, temperature: float, uniform_NT: Tensor, eos_id: int, cuts: list[LogitsProcessor] | None = None
    ) -> None:
        """`uniform_NT`: in [0, 1), a column for each token that may be drawn; in its dtype weights are added up."""
        self.temperature, self.uniform_NT, self.eos_id, self.cuts = temperature, uniform_NT, eos_id, cuts or []
        self.logp: list[Tensor] = []  # (N,) float32 for each token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        highest_N1 = scores.amax(dim=-1, keepdim=True)
        logit_NV = (scores - highest_N1).div_(self.temperature)
        weight_NV = logit_NV.exp() if self.cuts else logit_NV.exp_()
        total_N1 = block_sums(weight_NV).to(self.uniform_NT.dtype).sum(dim=-1, keepdim=True)
        for cut in self.cuts:
            logit_NV = cut(input_ids, logit_NV)
        if self.cuts:
            weight_NV = logit_NV.exp_()
        token_N1 = self.pick(weight_NV, self.uniform_NT[:, len(self.logp), None])
        token_N1 = torch.where(total_N1.isfinite(), token_N1, self.eos_id)
        chosen_N1 = (scores.gather(1, token_N1) - highest_N1) / self.temperature
        self.logp.append((chosen_N1 - total_N1.log()).float().squeeze(1))
        return weight_NV.zero_().scatter_(1, token_N1, 1.0)

    def pick(self, weight_NV: Tensor, uniform_N1: Tensor) -> Tensor:
        """token_N1, by these weights."""
        return token_at(weight_NV, uniform_N1)


def cuts(sampling: Sampling) -> list[LogitsProcessor]:
    """What leaves unlikely tokens out, in transformers' order."""
    found: list[LogitsProcessor] = []
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(MinPLogitsWarper(sampling.min_p))
    return found


def block_sums(weight_NV: Tensor) -> Tensor:
    """Of BLOCK words each, the last of those that are left over: (N, ceil(V / BLOCK))."""
    V = weight_NV.shape[1]
    whole_NB, left_NB = weight_NV.split([V - V % BLOCK, V % BLOCK], dim=1)
    sums = whole_NB.unflatten(1, (-1, BLOCK)).sum(dim=-1)
    return torch.cat([sums, left_NB.sum(dim=-1, keepdim=True)], dim=1)


def token_at(weight_NV: Tensor, uniform_N1: Tensor) -> Tensor:
    """The token that each row's uniform number falls on where the words' weights lie one behind the other: (N, 1).

    >>> token_at(torch.tensor([[1.0, 0.0, 3.0]]).expand(2, 3), torch.tensor([[0.24], [0.26]])).tolist()
    [[0], [2]]
    """
    if weight_NV.shape[1] <= BLOCK:
        return _fall(weight_NV, uniform_N1)[0]
    block_N1, uniform_N1 = _fall(block_sums(weight_NV), uniform_N1)
    word_NB = block_N1 * BLOCK + torch.arange(BLOCK, device=weight_NV.device)
    last = weight_NV.shape[1] - 1
    within_NB = weight_NV.gather(1, word_NB.clamp(max=last)).masked_fill(word_NB > last, 0)
    return block_N1 * BLOCK + _fall(within_NB, uniform_N1)[0]


def _fall(weight_NK: Tensor, uniform_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Where a uniform number falls: on weight k, never one that is 0; and how far into it, which is uniform again.
    In float64 no word is too unlikely to be told from nothing."""
    end_NK = running_sums(weight_NK.to(uniform_N1.dtype))
    total_N1 = end_NK[:, -1:]
    at_N1 = torch.minimum(uniform_N1 * total_N1, total_N1.nextafter(torch.zeros_like(total_N1)))
    k_N1 = torch.searchsorted(end_NK, at_N1, right=True).clamp(max=end_NK.shape[1] - 1)  # NaN falls behind the last
    weight_N1 = weight_NK.gather(1, k_N1).to(uniform_N1.dtype)
    before_N1 = end_NK.gather(1, k_N1) - weight_N1
    return k_N1, ((at_N1 - before_N1) / weight_N1).clamp(0, 1)


def running_sums(weight_NK: Tensor) -> Tensor:
    """(N, K): of each row's weights up to and with the kth. Under --deterministic CUDA's `cumsum` refuses to work."""
    if weight_NK.device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        return by_triangle(weight_NK)
    return weight_NK.cumsum(dim=1)


def by_triangle(weight_NK: Tensor) -> Tensor:
    """The same as a product. A sum never falls from one k to the next: all columns are added up in one order, in which
    a 0 becomes a weight."""
    K = weight_NK.shape[1]
    return weight_NK @ torch.ones(K, K, dtype=weight_NK.dtype, device=weight_NK.device).triu()

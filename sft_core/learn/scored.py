"""Log-probabilities without gradient, in micro-batches: the reference's, and the policy's entropies."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor

from sft_core.learn import ranks
from sft_core.learn.logprobs import token_logprobs
from sft_core.learn.rows import Rows, Tokens
from sft_core.learn.shards import is_shared, passes
from sft_core.model.policy import Policy


@torch.no_grad()
def scored(
    policy: Policy, rows: Rows, temperature: float, micro_batch: int | Tokens, entropy: Literal["none", "value"]
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` without gradient, one micro-batch at a time. Where something is not
    finite, each row is scored by itself: a bad row must not spoil those that share its prompt. Under torchrun each
    rank scores its part of the rows, and all get all."""
    logp_NT = torch.zeros_like(rows.completion_NT, dtype=policy.logp_dtype)
    entropy_NT = torch.zeros_like(logp_NT)
    with ranks.at_once("scores") if is_shared(policy.model) else nullcontext():
        for at, micro, _ in passes(rows, micro_batch, policy.model):
            cut = (at, slice(micro.completion_NT.shape[1]))
            logp_NT[cut], entropy_NT[cut] = token_logprobs(policy, micro, temperature, entropy)
    logp_NT, entropy_NT = rows.gathered(logp_NT, "scores"), rows.gathered(entropy_NT, "scores")
    if micro_batch != 1 and not logp_NT.isfinite().all():
        return scored(policy, rows, temperature, 1, entropy)
    return logp_NT, entropy_NT

"""The log-probability of each completion token under a policy: what SFT and GRPO both differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from sft_core.learn.layout import pack
from sft_core.learn.rows import Rows
from sft_core.learn.shards import in_one_pass
from sft_core.model.backbone import backbone_and_head
from sft_core.model.policy import Policy
from sft_core.model.segments import attending_by

Entropy = Literal["none", "value", "gradient"]


def token_logprobs(
    policy: Policy, rows: Rows, temperature: float = 1.0, entropy: Entropy = "value"
) -> tuple[Tensor, Tensor]:
    """log pi(token | everything before it) for each completion token, and the entropy of each predicting distribution.

    The logits are divided by the temperature that the sampler used, so that this is the distribution the tokens were
    drawn from. Softmax in float32 even where the logits came in half precision.

    Returns:
        logp_NT: float32 (float64 for a float64 model), differentiable, exactly 0 on padding.
        entropy_NT: in nats; without gradient unless `entropy="gradient"`; all 0 with "none", which saves time.
    """
    packed = pack(rows, policy.layout)
    backbone, logits_of = backbone_and_head(policy.model, policy.split_head)

    def compute() -> tuple[Tensor, Tensor]:
        with policy.precision.autocast(), attending_by(packed.segments):
            inputs = {"input_ids": packed.ids_RL, "attention_mask": packed.attention}
            hidden_RLD = backbone(**inputs, position_ids=packed.position_RL, use_cache=False).last_hidden_state
        hidden_MD = hidden_RLD.flatten(0, 1).index_select(0, packed.predictor_M)  # prompts and padding skip the head
        return _scores(logits_of, hidden_MD, packed.token_M, policy, temperature, entropy)

    scores = in_one_pass(policy.model, compute)
    shape, place_M = rows.completion_NT.shape, packed.place_M
    logp_NT, entropy_NT = (score_M.new_zeros(shape.numel()).index_copy(0, place_M, score_M) for score_M in scores)
    return logp_NT.view(shape), entropy_NT.view(shape)


def _scores(
    logits_of: Callable[[Tensor], Tensor],
    hidden_MD: Tensor,
    token_M: Tensor,
    policy: Policy,
    temperature: float,
    entropy: Entropy,
) -> tuple[Tensor, Tensor]:
    """logp_M and entropy_M, some tokens at a time. Only hidden_MD is kept for the backward pass: there the logits of a
    chunk, V numbers per token, are recomputed, and those of all tokens never exist at the same time."""

    def of_chunk(hidden: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        with policy.precision.autocast():
            logits = logits_of(hidden)
        logits = logits.to(policy.logp_dtype)
        if temperature != 1:
            logits = logits / temperature
        # Cross-entropy with one token is minus its log-softmax, in one pass; gather minus logsumexp takes two.
        logp = -cross_entropy(logits, token, reduction="none")
        if entropy == "none":
            return logp, torch.zeros_like(logp, requires_grad=False)
        with torch.set_grad_enabled(torch.is_grad_enabled() and entropy == "gradient"):
            logp_V = logits.log_softmax(dim=-1)
            return logp, -torch.einsum("nv,nv->n", logp_V.exp(), logp_V)  # H = -sum p log p

    size = max(1, policy.logit_chunk // policy.vocabulary) if policy.logit_chunk else max(1, len(token_M))
    parts = [
        checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        if policy.logit_chunk
        else of_chunk(*chunk)
        for chunk in zip(hidden_MD.split(size), token_M.split(size), strict=True)
    ]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)

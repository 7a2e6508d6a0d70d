"""The log-probability of each completion token under a policy: what SFT and GRPO both differentiate."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sft_core.policy import Policy
from sft_core.rows import Rows

ENTROPY_CHUNK = 2**24  # logits looked at together: 64 MB in float32


def token_logprobs(
    policy: Policy, rows: Rows, temperature: float = 1.0, entropy: Literal["none", "value", "gradient"] = "value"
) -> tuple[Tensor, Tensor]:
    """log pi(token | everything before it) for each completion token, and the entropy of each predicting distribution.

    The logits are divided by the temperature that the sampler used, so that this is the distribution the tokens were
    drawn from. Softmax in float32 even where the logits came in half precision.

    Returns:
        logp_NT: float32 (float64 for a float64 model), differentiable, exactly 0 on padding.
        entropy_NT: the same, in nats; without gradient unless `entropy="gradient"`, which keeps two more copies of the
            logits; all 0 with "none", which saves a third of the time where the vocabulary is large.
    """
    mask_NT, attention_NL = rows.mask_NT, rows.attention_NL
    # Left padding shifts absolute positions: number the real tokens 0, 1, 2, ... (GPT-2's learned positions need it;
    # rotary models only see differences).
    position_NL = (attention_NL.cumsum(dim=1) - 1).clamp(min=0)
    with policy.precision.autocast():
        logits_NTV = policy.model(
            input_ids=rows.ids_NL,
            attention_mask=attention_NL,
            position_ids=position_NL,
            use_cache=False,
            logits_to_keep=mask_NT.shape[1] + 1,  # the head runs on the T positions that predict a completion token ...
        ).logits[:, :-1]  # ... and the last position predicts what comes after the row
    logits_NTV = logits_NTV.to(torch.promote_types(logits_NTV.dtype, torch.float32))
    if temperature != 1:
        logits_NTV = logits_NTV / temperature
    # Cross-entropy with one token is minus its log-softmax, in one pass; gather minus logsumexp takes two.
    logp_NT = -cross_entropy(logits_NTV.flatten(0, 1), rows.completion_NT.flatten(), reduction="none").view_as(mask_NT)
    if entropy == "none":
        entropy_NT = torch.zeros_like(logp_NT, requires_grad=False)
    else:
        entropy_NT = _entropy(logits_NTV if entropy == "gradient" else logits_NTV.detach())
    return torch.where(mask_NT, logp_NT, 0.0), torch.where(mask_NT, entropy_NT, 0.0)


def _entropy(logits_NTV: Tensor) -> Tensor:
    """H = -sum p log p of each distribution, some tokens at a time: another copy of all logits might not fit."""
    parts = []
    for logits in logits_NTV.flatten(0, 1).split(max(1, ENTROPY_CHUNK // logits_NTV.shape[-1])):
        logp = logits.log_softmax(dim=-1)
        parts.append(-torch.einsum("nv,nv->n", logp.exp(), logp))
    return torch.cat(parts).view(logits_NTV.shape[:2])

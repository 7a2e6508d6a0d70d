"""The log-probability of each completion token under a policy: what SFT and GRPO both differentiate."""

from __future__ import annotations

import torch
from torch import Tensor

from sft_core.policy import Policy
from sft_core.rows import Rows


def token_logprobs(policy: Policy, rows: Rows, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log pi(token | everything before it) for each completion token, and the entropy of each predicting distribution.

    The logits are divided by the temperature that the sampler used, so that this is the distribution the tokens were
    drawn from. Softmax in float32 whatever the logits came in.

    Returns:
        logp_NT: float32, differentiable, exactly 0 on padding.
        entropy_NT: float32 nats, without gradient, exactly 0 on padding.
    """
    mask_NT = rows.mask_NT
    attention_NL = rows.attention_NL
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
    logits_NTV = logits_NTV.float() / temperature
    normalizer_NT = logits_NTV.logsumexp(dim=-1)
    chosen_NT = logits_NTV.gather(-1, rows.completion_NT[..., None]).squeeze(-1)
    logp_NT = torch.where(mask_NT, chosen_NT - normalizer_NT, 0.0)
    with torch.no_grad():  # H = logsumexp(z) - sum softmax(z) z
        expected_NT = torch.einsum("ntv,ntv->nt", logits_NTV.softmax(dim=-1), logits_NTV)
        entropy_NT = torch.where(mask_NT, normalizer_NT - expected_NT, 0.0)
    return logp_NT, entropy_NT

"""The log-probability of each completion token under a policy: what SFT and GRPO both differentiate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from sft_core.packing import pack
from sft_core.policy import Policy
from sft_core.rows import Rows

Entropy = Literal["none", "value", "gradient"]


def token_logprobs(
    policy: Policy, rows: Rows, temperature: float = 1.0, entropy: Entropy = "value"
) -> tuple[Tensor, Tensor]:
    """log pi(token | everything before it) for each completion token, and the entropy of each predicting distribution.

    The logits are divided by the temperature that the sampler used, so that this is the distribution the tokens were
    drawn from. Softmax in float32 even where the logits came in half precision.

    Returns:
        logp_NT: float32 (float64 for a float64 model), differentiable, exactly 0 on padding.
        entropy_NT: the same, in nats; without gradient unless `entropy="gradient"`; all 0 with "none", which saves a
            third of the head's time where the vocabulary is large.
    """
    packed = pack(rows, policy.share_prompts)
    backbone, logits_of = backbone_and_head(policy.model)
    with policy.precision.autocast():
        hidden_RLD = backbone(
            input_ids=packed.ids_RL,
            attention_mask=packed.attention,
            position_ids=packed.position_RL,
            use_cache=False,
        ).last_hidden_state
    hidden_MD = hidden_RLD.flatten(0, 1)[packed.predictor_M]  # padding and prompts cost the head nothing
    mask_NT = rows.mask_NT
    logp_M, entropy_M = _scores(logits_of, hidden_MD, rows.completion_NT[mask_NT], policy, temperature, entropy)
    nothing_NT = torch.zeros(mask_NT.shape, dtype=logp_M.dtype, device=logp_M.device)
    return nothing_NT.masked_scatter(mask_NT, logp_M), nothing_NT.masked_scatter(mask_NT, entropy_M)


@torch.no_grad()
def scored(
    policy: Policy, rows: Rows, temperature: float, micro_batch: int, entropy: Literal["none", "value"]
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of rows too many for one pass, a micro-batch at a time, without gradient. Where something is not
    finite each row is scored by itself: one that is lost must not take those along that share its prompt."""
    logp_NT = torch.zeros_like(rows.completion_NT, dtype=policy.logp_dtype)
    entropy_NT = torch.zeros_like(logp_NT)
    for at, micro in rows.micro_batches(micro_batch):
        cut = (at, slice(micro.completion_NT.shape[1]))
        logp_NT[cut], entropy_NT[cut] = token_logprobs(policy, micro, temperature, entropy)
    if micro_batch > 1 and not logp_NT.isfinite().all():
        return scored(policy, rows, temperature, 1, entropy)
    return logp_NT, entropy_NT


def backbone_and_head(model: Any) -> tuple[Any, Callable[[Tensor], Tensor]]:
    """The model without its output head, and the head: hidden states to logits."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # a peft model's own
    head, config = inner.get_output_embeddings(), inner.config
    cap, divisor = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None)

    def logits_of(hidden: Tensor) -> Tensor:
        logits: Tensor = head(hidden)
        if divisor:  # Granite
            logits = logits / divisor
        if cap:  # Gemma
            logits = cap * torch.tanh(logits / cap)
        return logits

    return getattr(inner, inner.base_model_prefix), logits_of


def _scores(
    logits_of: Callable[[Tensor], Tensor],
    hidden_MD: Tensor,
    token_M: Tensor,
    policy: Policy,
    temperature: float,
    entropy: Entropy,
) -> tuple[Tensor, Tensor]:
    """logp_M and entropy_M, some tokens at a time. What is kept for the backward pass is hidden_MD alone: the logits of
    a chunk, V numbers a token, are computed again there, and those of all tokens never exist together."""

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
            return logp, _entropy(logits)

    vocabulary = policy.model.config.vocab_size
    size = max(1, policy.logit_chunk // vocabulary) if policy.logit_chunk else max(1, len(token_M))
    parts = [
        checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        if policy.logit_chunk
        else of_chunk(*chunk)
        for chunk in zip(hidden_MD.split(size), token_M.split(size), strict=True)
    ]
    logps, entropies = zip(*parts, strict=True)
    return torch.cat(logps), torch.cat(entropies)


def _entropy(logits: Tensor) -> Tensor:
    """H = -sum p log p of each distribution."""
    logp = logits.log_softmax(dim=-1)
    return -torch.einsum("nv,nv->n", logp.exp(), logp)

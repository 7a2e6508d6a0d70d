"""The log-probability of each completion token under a policy: what SFT and GRPO both differentiate.

A group of G completions of one prompt as G rows would compute the prompt G times. Packed, it is one row; here G = 2:

    ids         q  q  q  a  b  e  c  e            a b e and c e answer q q q
    position    0  1  2  3  4  5  3  4            each completion continues after the prompt
    attention   1  .  .  .  .  .  .  .
                1  1  .  .  .  .  .  .
                1  1  1  .  .  .  .  .
                1  1  1  1  .  .  .  .            a sees the prompt and itself
                1  1  1  1  1  .  .  .
                1  1  1  1  1  1  .  .
                1  1  1  .  .  .  1  .            c sees the prompt, not the other completion
                1  1  1  .  .  .  1  1
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from sft_core.learn.rows import Rows, pad
from sft_core.model.backbone import backbone_and_head
from sft_core.model.policy import Policy

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
    packed = pack(rows, policy.share_prompts)
    backbone, logits_of = backbone_and_head(policy.model, policy.split_head)
    with policy.precision.autocast():
        inputs = {"input_ids": packed.ids_RL, "attention_mask": packed.attention, "position_ids": packed.position_RL}
        hidden_RLD = backbone(**inputs, use_cache=False).last_hidden_state
    hidden_MD = hidden_RLD.flatten(0, 1).index_select(0, packed.predictor_M)  # prompts and padding skip the head
    mask_NT = rows.mask_NT
    logp_M, entropy_M = _scores(logits_of, hidden_MD, rows.completion_NT[mask_NT], policy, temperature, entropy)
    nothing_NT = torch.zeros(mask_NT.shape, dtype=logp_M.dtype, device=logp_M.device)
    return nothing_NT.masked_scatter(mask_NT, logp_M), nothing_NT.masked_scatter(mask_NT, entropy_M)


@dataclass(frozen=True)
class Packed:
    """R packed rows of width L, padded on the right, and where in them each of the M completion tokens is predicted."""

    ids_RL: Tensor
    position_RL: Tensor
    attention: Tensor  # (R, L), or (R, 1, L, L) bool where a row holds several completions
    predictor_M: Tensor  # index into the flattened (R * L): the token before, for the first the prompt's last


def pack(rows: Rows, share_prompts: bool) -> Packed:
    """Lay out a micro-batch. Consecutive rows with the same prompt share it."""
    groups: list[tuple[list[int], list[list[int]]]] = []
    for prompt, completion in zip(rows.prompt_ids(), rows.completion_ids(), strict=True):
        if share_prompts and groups and groups[-1][0] == prompt:
            groups[-1][1].append(completion)
        else:
            groups.append((prompt, [completion]))
    L = max(len(prompt) + sum(map(len, completions)) for prompt, completions in groups)
    ids, positions, segments, predictors = [], [], [], []
    for row, (prompt, completions) in enumerate(groups):
        P, at = len(prompt), row * L + len(prompt)
        ids.append(prompt + [token for completion in completions for token in completion])
        positions.append([*range(P), *(P + t for completion in completions for t in range(len(completion)))])
        segments.append([0] * P + [number for number, completion in enumerate(completions, 1) for _ in completion])
        for completion in completions:
            if completion:
                predictors += [row * L + P - 1, *range(at, at + len(completion) - 1)]
            at += len(completion)
    segment_RL = pad(segments, -1, "right")  # 0: prompt; 1, 2, ...: completions; -1: padding
    alone = all(len(completions) == 1 for _, completions in groups)
    attention = (segment_RL >= 0).long() if alone else _attention(segment_RL)
    predictor_M = torch.tensor(predictors, dtype=torch.long)
    parts = (pad(ids, 0, "right"), pad(positions, 0, "right"), attention, predictor_M)
    return Packed(*(part.to(rows.ids_NL.device) for part in parts))


def _attention(segment_RL: Tensor) -> Tensor:
    """Causal, within the prompt and the token's own completion; padding sees itself, so that no softmax is empty."""
    query, key = segment_RL[:, :, None], segment_RL[:, None, :]
    causal = torch.ones(segment_RL.shape[1], segment_RL.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]


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

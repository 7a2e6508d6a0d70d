"""Completions from a policy through `model.generate`: drawn from exactly the distribution
that the learner scores, unless top-k, top-p or min-p cut it.

A prompt is encoded once, and its keys and values are copied to its G rows. `generate` is called in segments: when a
quarter of the rows have ended, they leave the batch, and the others continue with their part of the cache.

    q q q | a b e                  first segment: rows 1 and 2 share q; row 2 ends
    q q q | c e .
    q q q | a b e | d f e          second segment: row 1 alone
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    StoppingCriteriaList,
    TextStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from eval.around import equal_lengths, ready_to_generate
from eval.cache import room_for
from eval.draw import Draw
from sft_core.learn.rows import Rows, pad
from sft_core.model.backbone import backbone_and_head
from sft_core.model.half import half_twin
from sft_core.model.policy import Policy

LEAVING = 4  # a segment ends when one row in so many has ended


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 cut nothing off."""

    max_completion_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass(frozen=True)
class Samples:
    """N completions, in the order of their prompts."""

    rows: Rows
    texts: list[str]  # decoded for people and rewards; never tokenized again
    truncated_N: Tensor  # bool: the budget ended the completion, not the model
    logp_NT: Tensor  # float32: each token's log-probability as the sampler computed it; 0 on padding, empty when greedy


def sample(
    policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, streamer: TextStreamer | None = None
) -> Samples:
    """One completion for each prompt (token lists), in one batch; `streamer` shows a single one as it is drawn."""
    device, N = policy.device, len(prompts)
    completion_NT = torch.full((N, sampling.max_completion_tokens), policy.pad_id, device=device)
    drawn_NT = completion_NT.shape if sampling.temperature else (N, 0)
    logp_NT = torch.zeros(drawn_NT, device=device)
    wide = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
    uniform_NT = torch.rand(drawn_NT, dtype=wide).to(device)  # from the CPU: the same on every device
    for batch in [list(range(N))] if policy.pads else equal_lengths(prompts):
        _generate(policy, prompts, batch, sampling, uniform_NT, completion_NT, logp_NT, streamer)
    completion_len_N, ended_N = completion_lengths(completion_NT, policy.eos_ids)
    prompt_NP, T = pad(prompts, policy.pad_id, "left").to(device), int(completion_len_N.max())
    prompt_len_N = torch.tensor([len(p) for p in prompts], device=device)
    ids_NL = torch.cat([prompt_NP, completion_NT[:, :T]], dim=1)
    rows = Rows(ids_NL, prompt_len_N, completion_len_N, prompt_NP.shape[1])
    texts = policy.tokenizer.batch_decode(rows.completion_ids(), skip_special_tokens=True)
    logp_NT = torch.where(rows.mask_NT, logp_NT[:, :T], 0.0) if sampling.temperature else logp_NT
    return Samples(rows, texts, ~ended_N, logp_NT)


def completion_lengths(completion_NT: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Length up to and including the first end-of-sequence id, and whether there was one. What follows it is padding.

    >>> lengths, ended = completion_lengths(torch.tensor([[5, 2, 2], [5, 6, 7], [3, 5, 2]]), eos_ids=[2, 3])
    >>> lengths.tolist(), ended.tolist()
    ([2, 3, 1], [True, False, True])
    """
    is_eos_NT = torch.isin(completion_NT, torch.tensor(list(eos_ids), device=completion_NT.device))
    ended_N = is_eos_NT.any(dim=1)
    first_N = is_eos_NT.int().argmax(dim=1) + 1  # argmax finds the first of equal values
    return torch.where(ended_N, first_N, completion_NT.shape[1]), ended_N


def _generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    batch: Sequence[int],
    sampling: Sampling,
    uniform_NT: Tensor,
    completion_NT: Tensor,
    logp_NT: Tensor,
    streamer: TextStreamer | None,
) -> None:
    """Fill the rows `batch` of completion_NT, and of logp_NT: at the temperature, before any cut. Each token is drawn
    by its number of uniform_NT."""
    device, budget = policy.device, sampling.max_completion_tokens
    ids = pad([prompts[row] for row in batch], policy.pad_id, "left").to(device)
    P, prompt_len_N = ids.shape[1], torch.tensor([len(prompts[row]) for row in batch], device=device)
    # None: `generate` makes a cache of the model's own kind.
    cache: Any = DynamicCache(config=policy.model.config) if policy.prefill or policy.rows_leave else None
    if cache is not None:
        room_for(cache, P + budget, policy.model, policy.precision.autocast_dtype)
    width = 0  # tokens drawn until now
    with (
        torch.inference_mode(),
        half_twin(policy.model, policy.half_dtype) as model,
        ready_to_generate(model),
        policy.precision.autocast(),
    ):
        attention = (torch.arange(P, device=device) >= P - prompt_len_N[:, None]).long()
        if policy.prefill:
            prefill_once(cache, model, prompts, ids, attention)
        alive = torch.tensor(batch, device=device)
        while len(alive) and width < budget:
            draw = Draw(sampling.temperature, uniform_NT[alive, width:], policy.eos_ids[0], _cuts(sampling))
            enough = _SomeHaveEnded(policy.eos_ids, device)
            longer = model.generate(
                input_ids=ids,
                attention_mask=attention,
                past_key_values=cache,
                generation_config=_generation_config(policy, budget - width),
                logits_processor=LogitsProcessorList([draw] if sampling.temperature else []),
                stopping_criteria=StoppingCriteriaList([enough] if policy.rows_leave else []),
                streamer=streamer,
            )
            drawn = longer[:, P + width :]
            end = width + drawn.shape[1]
            completion_NT[alive, width:end] = drawn
            if sampling.temperature:
                logp_NT[alive, width:end] = torch.stack(draw.logp, dim=1)
            going = (~completion_lengths(drawn, policy.eos_ids)[1]).nonzero().squeeze(1)
            alive, ids, width = alive[going], longer[going], end
            attention = torch.nn.functional.pad(attention[going], (0, P + end - attention.shape[1]), value=1)
            if cache is not None and len(alive):
                cache.batch_select_indices(going)


def _generation_config(policy: Policy, tokens: int) -> GenerationConfig:
    """All of `generate`'s settings: the most probable token, or the one that `Draw` marks. The model's own (repetition
    penalty, top-k, top-p) are not inherited."""
    config = GenerationConfig(max_new_tokens=tokens, eos_token_id=list(policy.eos_ids), pad_token_id=policy.pad_id)
    config.use_cache = policy.cached
    return config


def _cuts(sampling: Sampling) -> list[LogitsProcessor]:
    """What leaves unlikely tokens out, in transformers' order."""
    cuts: list[LogitsProcessor] = []
    if sampling.top_k:
        cuts.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        cuts.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        cuts.append(MinPLogitsWarper(sampling.min_p))
    return cuts


def prefill_once(
    cache: Any, model: Any, prompts: Sequence[Sequence[int]], prompt_NP: Tensor, attention_NP: Tensor
) -> None:
    """Fill the cache with each row's prompt except its last token, computed once for consecutive equal prompts."""
    if prompt_NP.shape[1] == 1:
        return
    first = [row for row in range(len(prompts)) if row == 0 or prompts[row] != prompts[row - 1]]
    attention_RP = attention_NP[first]
    backbone, _ = backbone_and_head(model)
    backbone(
        input_ids=prompt_NP[first, :-1],
        attention_mask=attention_RP[:, :-1],
        position_ids=(attention_RP.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    begins = torch.zeros(len(prompts), dtype=torch.long)
    begins[first[1:]] = 1
    cache.batch_select_indices(begins.cumsum(dim=0).to(prompt_NP.device))


class _SomeHaveEnded(StoppingCriteria):  # type: ignore[misc]
    """Ends a segment for all of its rows once one in LEAVING has ended."""

    def __init__(self, eos_ids: Sequence[int], device: torch.device) -> None:
        self.eos_ids, self.ended_N = torch.tensor(list(eos_ids), device=device), torch.tensor(False, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.ended_N = self.ended_N | torch.isin(input_ids[:, -1], self.eos_ids)
        return (self.ended_N.sum() * LEAVING >= len(self.ended_N)).expand(len(self.ended_N))

"""`model.generate`, called so that no row costs more than it must.

A group of G completions of one prompt would read the prompt G times, and a batch would go on until its longest
completion ends. Here a prompt is read once, its keys and values are handed to its G rows, and `generate` is called in
segments: when a quarter of the rows have ended, they leave, and the others go on with their part of the cache.

    q q q | a b e                  first segment: rows 1 and 2 read q once; row 2 ends
    q q q | c e .
    q q q | a b e | d f e          second segment: row 1 alone
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from sft_core.half import half_twin
from sft_core.logprobs import backbone_and_head
from sft_core.policy import Policy

LEAVING = 4  # a segment ends when one row in so many has ended


def generate(
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    prompt_NP: Tensor,
    prompt_len_N: Tensor,
    config: GenerationConfig,
    temperature: float,
    streamer: Any = None,
) -> tuple[Tensor, Tensor]:
    """One completion for each prompt (a list, and a row of `prompt_NP` padded on the left), as `config` says, in the
    policy's own precision. A `streamer` of transformers is shown each token of a single row as it is drawn.

    Returns:
        completion_NT: int64, each row's tokens up to its end; then filler.
        logp_NT: float32, each token's log-probability before any cut, at the temperature; filler likewise. Not computed
            (empty) at temperature 0.
    """
    device, (N, P), budget = policy.device, prompt_NP.shape, config.max_new_tokens
    attention_NP = (torch.arange(P, device=device) >= P - prompt_len_N[:, None]).long()
    completion_NT = torch.full((N, budget), policy.pad_id, device=device)
    logp_NT = torch.zeros(N, budget if temperature else 0, device=device)
    width = 0  # tokens drawn until now
    with torch.inference_mode(), half_twin(policy) as model, _ready_to_generate(model), policy.precision.autocast():
        cache: Any = None  # the model's own kind
        if policy.share_prompts or policy.rows_leave:
            cache = DynamicCache(config=model.config)
        if policy.share_prompts:
            prefill_once(cache, model, prompts, prompt_NP, attention_NP)
        alive = torch.arange(N, device=device)
        ids, attention = prompt_NP, attention_NP
        while len(alive) and width < budget:
            recorder = _LogprobRecorder(temperature, policy.eos_ids[0])
            enough = _SomeHaveEnded(policy.eos_ids, P + width)
            config.max_new_tokens = budget - width
            longer = model.generate(
                input_ids=ids,
                attention_mask=attention,
                past_key_values=cache,
                generation_config=config,
                logits_processor=LogitsProcessorList([recorder] if temperature else []),
                stopping_criteria=StoppingCriteriaList([enough] if policy.rows_leave else []),
                streamer=streamer,
            )
            drawn = longer[:, P + width :]
            end = width + drawn.shape[1]
            completion_NT[alive, width:end] = drawn
            if temperature:
                recorder.settle(longer[:, -1])
                logp_NT[alive, width:end] = torch.stack(recorder.logp, dim=1)
            going = (~_ended(drawn, policy.eos_ids)).nonzero().squeeze(1)
            alive, ids, attention, width = alive[going], longer[going], _grown(attention[going], P + end), end
            if cache is not None and len(alive):
                cache.batch_select_indices(going)
    # Outside inference mode a copy is a tensor that autograd may save.
    return completion_NT[:, :width].clone(), logp_NT[:, :width].clone()


def prefill_once(
    cache: Any, model: Any, prompts: Sequence[Sequence[int]], prompt_NP: Tensor, attention_NP: Tensor
) -> None:
    """Put each row's prompt but its last token in the cache, computed once where consecutive prompts are the same."""
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


def _grown(attention: Tensor, width: int) -> Tensor:
    """The mask of rows that have grown to `width` by tokens of their own."""
    return torch.nn.functional.pad(attention, (0, width - attention.shape[1]), value=1)


def _ended(drawn: Tensor, eos_ids: Sequence[int]) -> Tensor:
    return torch.isin(drawn, torch.tensor(list(eos_ids), device=drawn.device)).any(dim=1)


class _SomeHaveEnded(StoppingCriteria):  # type: ignore[misc]
    """Ends a segment for all of its rows once one in LEAVING has ended."""

    def __init__(self, eos_ids: Sequence[int], start: int) -> None:
        self.eos_ids, self.start = eos_ids, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        ended_N = _ended(input_ids[:, self.start :], self.eos_ids)
        return (ended_N.sum() * LEAVING >= len(ended_N)).expand(len(ended_N))


class _LogprobRecorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps each sampled token's log-probability without keeping any step's logits.

    Nothing can be drawn from logits that are not numbers: such a row ends there, with a log-probability that is not one
    either. The learner comes upon the same logits, and `Optimizer` skips the step and names the row.

    `generate` calls it with the logits of step t; the token drawn from them is the last of `input_ids` at step t + 1.
    It runs before the temperature is applied, hence the division here.
    """

    def __init__(self, temperature: float, eos_id: int) -> None:
        self.temperature, self.eos_id = temperature, eos_id
        self.pending: Tensor | None = None
        self.logp: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.settle(input_ids[:, -1])
        self.pending = scores.float() / self.temperature
        self.normalizer_N = self.pending.logsumexp(dim=-1)
        lost_N = ~self.normalizer_N.isfinite()
        if lost_N.any():
            scores = scores.masked_fill(lost_N[:, None], -torch.inf)
            scores[lost_N, self.eos_id] = 0.0
        return scores

    def settle(self, token_N: Tensor) -> None:
        if self.pending is not None:
            chosen_N = self.pending.gather(-1, token_N[:, None]).squeeze(-1)
            self.logp.append(chosen_N - self.normalizer_N)
            self.pending = None


@contextlib.contextmanager
def _ready_to_generate(model: Any) -> Iterator[None]:
    """In eval mode, so that dropout is off and gradient checkpointing does not disable the cache, and with an empty
    generation config on the model: `generate` fills whatever ours leaves unset from the model's."""
    was_training, shipped = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = shipped
        model.train(was_training)

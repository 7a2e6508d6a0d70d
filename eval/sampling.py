"""Completions from a policy through `model.generate`: drawn from exactly the distribution
that the learner scores, unless top-k, top-p or min-p cut it.

A prompt is encoded once, and its keys and values are copied to its G rows. `generate` is called in segments: when a
quarter of the rows have ended, they leave the batch, and the others continue with their part of the cache, beside
prompts that have waited.

    q q q | a b e                  first segment: rows 1 and 2 share q; row 2 ends
    q q q | c e .
    q q q | a b e | d f e          second segment: row 1 goes on, row 3 begins
    . . . . . p p | g h i
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
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
from eval.draw import Draw
from eval.going import Going
from sft_core.learn import ranks
from sft_core.learn.rows import Rows, pad
from sft_core.model.half import half_twin
from sft_core.model.policy import Policy

LEAVING = 4  # a segment ends when one row in so many has ended


class Completion(NamedTuple):
    """One that has ended."""

    text: str
    tokens: int
    truncated: bool


Ended = Callable[[list[int], list[Completion]], None]  # told of the places of completions that have ended


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
    policy: Policy,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    at_once: int | None = None,
    streamer: TextStreamer | None = None,
    ended: Ended | None = None,
) -> Samples:
    """One completion for each prompt (token lists): of all at a time, or of `at_once`, the next prompt taking the place
    of a row that has ended. `streamer` shows a single one as it is drawn; `ended` is called with those that have ended,
    and their places."""
    at_once = at_once or len(prompts)
    sheet = Sheet(policy, len(prompts), sampling, ended)
    with (
        torch.inference_mode(),
        half_twin(policy.model, policy.half_dtype) as model,
        ready_to_generate(model),
        policy.precision.autocast(),
    ):
        mine = _dealt(prompts)
        for batch in _batches(policy, prompts, mine, at_once):
            _fill(sheet, policy, model, prompts, batch, at_once, sampling, streamer)
    sheet.exchange(mine)
    return sheet.samples(prompts)


class Sheet:
    """The completions of N prompts while they are drawn."""

    def __init__(self, policy: Policy, N: int, sampling: Sampling, ended: Ended | None) -> None:
        device = policy.device
        self.policy, self.sampling, self.tell = policy, sampling, ended
        self.texts = [""] * N
        self.length_N = torch.zeros(N, dtype=torch.long, device=device)
        self.truncated_N = torch.zeros(N, dtype=torch.bool, device=device)
        self.completion_NT = torch.full((N, sampling.max_completion_tokens), policy.pad_id, device=device)
        drawn_NT = self.completion_NT.shape if sampling.temperature else (N, 0)
        self.logp_NT = torch.zeros(drawn_NT, device=device)  # at the temperature, before any cut
        wide = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
        # By which each token is drawn; from the CPU: the same on every device.
        self.uniform_NT = torch.rand(drawn_NT, dtype=wide).to(device)

    def numbers(self, place_N1: Tensor, column_NT: Tensor) -> Tensor:
        """uniform_NT of these tokens; empty when greedy."""
        return self.uniform_NT[place_N1, column_NT] if self.sampling.temperature else self.uniform_NT

    def write(self, place_N1: Tensor, column_NT: Tensor, drawn_NT: Tensor, logp: Sequence[Tensor]) -> None:
        """Put down the next tokens of some rows."""
        self.completion_NT[place_N1, column_NT] = drawn_NT
        if self.sampling.temperature:
            self.logp_NT[place_N1, column_NT] = torch.stack(list(logp), dim=1)

    def ended(self, place_N: Tensor) -> None:
        """Rows are complete: measure, decode and tell of them."""
        if not len(place_N):
            return
        ids_NT = self.completion_NT[place_N]
        self.length_N[place_N], ended_N = completion_lengths(ids_NT, self.policy.eos_ids)
        self.truncated_N[place_N] = ~ended_N
        places, lengths = place_N.tolist(), self.length_N[place_N].tolist()
        ids = [ids[:length] for ids, length in zip(ids_NT.tolist(), lengths, strict=True)]
        texts = self.policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            self.texts[place] = text
        if self.tell:
            self.tell(places, [*map(Completion, texts, lengths, self.truncated_N[place_N].tolist())])

    def exchange(self, mine: Sequence[int]) -> None:
        """Under torchrun: give what this rank has drawn, at the places `mine`, for what the others have."""
        drawn = (list(mine), self.completion_NT[mine].cpu(), self.logp_NT[mine].cpu())
        for number, (places, completion_NT, logp_NT) in enumerate(ranks.gathered(drawn, "completions")):
            if number != ranks.rank():
                self.completion_NT[places] = completion_NT.to(self.completion_NT.device)
                self.logp_NT[places] = logp_NT.to(self.logp_NT.device)
                self.ended(torch.tensor(places, dtype=torch.long, device=self.completion_NT.device))

    def samples(self, prompts: Sequence[Sequence[int]]) -> Samples:
        """All of them, when all have ended."""
        prompt_NP = pad(prompts, self.policy.pad_id, "left").to(self.policy.device)
        prompt_len_N = torch.tensor([len(p) for p in prompts], device=self.policy.device)
        T = int(self.length_N.max())
        ids_NL = torch.cat([prompt_NP, self.completion_NT[:, :T]], dim=1)
        rows = Rows(ids_NL, prompt_len_N, self.length_N, prompt_NP.shape[1])
        greedy = not self.sampling.temperature
        logp_NT = self.logp_NT if greedy else torch.where(rows.mask_NT, self.logp_NT[:, :T], 0.0)
        return Samples(rows, self.texts, self.truncated_N, logp_NT)


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


def _dealt(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The places of the prompts that this rank draws: all, or under torchrun those of every so-manieth group of equal
    ones."""
    groups = itertools.groupby(range(len(prompts)), key=lambda place: prompts[place])
    dealt = itertools.islice(groups, ranks.rank(), None, ranks.world())
    return [place for _, places in dealt for place in places]


def _batches(
    policy: Policy, prompts: Sequence[Sequence[int]], places: Sequence[int], at_once: int
) -> list[Sequence[int]]:
    """The prompts' places, in batches that are drawn one after the other: a single one where a prompt that waits can
    take the place of a row that has ended."""
    if not places:
        return []
    batches: list[Sequence[int]] = [places] if policy.pads else [*equal_lengths(prompts, places)]
    if policy.pads and policy.prefill and policy.rows_leave and policy.rows_join:
        return batches
    return [batch[first : first + at_once] for batch in batches for first in range(0, len(batch), at_once)]


def _fill(
    sheet: Sheet,
    policy: Policy,
    model: Any,
    prompts: Sequence[Sequence[int]],
    waiting: Sequence[int],
    at_once: int,
    sampling: Sampling,
    streamer: TextStreamer | None,
) -> None:
    """Draw the completions of the prompts at the places `waiting`."""
    budget = sampling.max_completion_tokens
    going, waiting = Going.begin(policy, model, prompts, waiting[:at_once], budget), waiting[at_once:]
    while going or waiting:
        if waiting and len(going) < at_once:
            free = at_once - len(going)
            fresh, waiting = Going.begin(policy, model, prompts, waiting[:free], budget), waiting[free:]
            going = going.joined_by(fresh)
        place_N1, tokens = going.place_N[:, None], budget - int(going.drawn_N.max())
        column_NT = going.drawn_N[:, None] + torch.arange(tokens, device=policy.device)
        draw = Draw(sampling.temperature, sheet.numbers(place_N1, column_NT), policy.eos_ids[0], _cuts(sampling))
        enough = _SomeHaveEnded(policy.eos_ids, policy.device)
        longer_NW = model.generate(
            input_ids=going.ids_NW,
            attention_mask=going.attention_NW,
            past_key_values=going.cache,
            generation_config=_generation_config(policy, tokens),
            logits_processor=LogitsProcessorList([draw] if sampling.temperature else []),
            stopping_criteria=StoppingCriteriaList([enough] if policy.rows_leave else []),
            streamer=streamer,
        )
        drawn_NT = longer_NW[:, going.ids_NW.shape[1] :]
        sheet.write(place_N1, column_NT[:, : drawn_NT.shape[1]], drawn_NT, draw.logp)
        going.drew(longer_NW)
        over_N = completion_lengths(drawn_NT, policy.eos_ids)[1] | (going.drawn_N == budget)
        sheet.ended(going.place_N[over_N])
        going.keep((~over_N).nonzero().squeeze(1))


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


class _SomeHaveEnded(StoppingCriteria):  # type: ignore[misc]
    """Ends a segment for all of its rows once one in LEAVING has ended."""

    def __init__(self, eos_ids: Sequence[int], device: torch.device) -> None:
        self.eos_ids, self.ended_N = torch.tensor(list(eos_ids), device=device), torch.tensor(False, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.ended_N = self.ended_N | torch.isin(input_ids[:, -1], self.eos_ids)
        return (self.ended_N.sum() * LEAVING >= len(self.ended_N)).expand(len(self.ended_N))

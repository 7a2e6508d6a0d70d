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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList, TextStreamer

from eval.around import equal_lengths, generation_config, ready_to_generate
from eval.decoding.compiled import fill_compiled, model_to_decode
from eval.decoding.paged import fill_paged
from eval.draw import Draw, cuts
from eval.going import Going
from eval.samples import Ended, Samples, Sampling, Sheet, completion_lengths
from sft_core.learn import ranks
from sft_core.model.policy import Policy
from sft_core.model.sending import sent

LEAVING = 4  # a segment ends when one row in so many has ended


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
        model_to_decode(policy) as model,
        torch.inference_mode(),
        ready_to_generate(model),
        policy.precision.autocast(),
    ):
        mine = _dealt(prompts)
        for batch in _batches(policy, prompts, mine, at_once):
            FILL[policy.decoding](sheet, model, prompts, batch, min(at_once, len(mine)), streamer)
    sheet.exchange(mine)
    return sheet.samples(prompts)


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
    if policy.decoding == "paged":
        return [places]  # nothing is padded, and prompts come in by themselves
    batches: list[Sequence[int]] = [places] if policy.pads else [*equal_lengths(prompts, places)]
    joining = policy.decoding == "segments" and policy.rows_leave and policy.rows_join
    if policy.pads and policy.prefill and joining:
        return batches
    return [batch[first : first + at_once] for batch in batches for first in range(0, len(batch), at_once)]


def fill_in_segments(
    sheet: Sheet,
    model: Any,
    prompts: Sequence[Sequence[int]],
    waiting: Sequence[int],
    at_once: int,
    streamer: TextStreamer | None,
) -> None:
    """Draw the completions of the prompts at the places `waiting`."""
    policy, sampling = sheet.policy, sheet.sampling
    budget = sampling.max_completion_tokens
    going, waiting = Going.begin(policy, model, prompts, waiting[:at_once], budget), waiting[at_once:]
    while going or waiting:
        if waiting and len(going) < at_once:
            free = at_once - len(going)
            fresh, waiting = Going.begin(policy, model, prompts, waiting[:free], budget), waiting[free:]
            going = going.joined_by(fresh)
        place_N1, tokens = going.place_N[:, None], budget - int(going.drawn_N.max())
        column_NT = going.drawn_N[:, None] + torch.arange(tokens)
        draw = Draw(sampling.temperature, sheet.numbers(place_N1, column_NT), policy.eos_ids[0], cuts(sampling))
        enough = _SomeHaveEnded(policy.eos_ids, policy.device)
        longer_NW = model.generate(
            input_ids=going.ids_NW,
            attention_mask=going.attention_NW,
            past_key_values=going.cache,
            generation_config=generation_config(policy, tokens),
            logits_processor=LogitsProcessorList([draw] if sampling.temperature else []),
            stopping_criteria=StoppingCriteriaList([enough] if policy.rows_leave else []),
            streamer=streamer,
        )
        drawn_NT = longer_NW[:, going.ids_NW.shape[1] :].cpu()
        sheet.write(place_N1, column_NT[:, : drawn_NT.shape[1]], drawn_NT, draw.logp)
        going.drew(longer_NW)
        over_N = completion_lengths(drawn_NT, policy.eos_ids)[1] | (going.drawn_N == budget)
        sheet.ended(going.place_N[over_N])
        going.keep((~over_N).nonzero().squeeze(1))


class _SomeHaveEnded(StoppingCriteria):  # type: ignore[misc]
    """Ends a segment for all of its rows once one in LEAVING has ended."""

    def __init__(self, eos_ids: Sequence[int], device: torch.device) -> None:
        self.eos_ids = sent(torch.tensor(list(eos_ids)), device)
        self.ended_N = torch.zeros((), dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.ended_N = self.ended_N | torch.isin(input_ids[:, -1], self.eos_ids)
        return (self.ended_N.sum() * LEAVING >= len(self.ended_N)).expand(len(self.ended_N))


FILL = {"segments": fill_in_segments, "compiled": fill_compiled, "paged": fill_paged}  # by `Policy.decoding`

"""The sampler's shortcuts, tried on the very model that was loaded (why: sft_core/learn/trust.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from eval.decoding.compiled import forget_pass
from eval.samples import Samples, Sampling
from eval.sampling import sample
from sft_core.learn.trust import (
    BOUNDS,
    TEMPERATURE,
    Way,
    exact,
    first_that_agrees,
    largest_difference,
    plain_logprobs,
    probe_rows,
    trusted_learner,
    undisturbed,
)
from sft_core.model.policy import Policy, without_dropout
from sft_core.model.segments import layouts

TOKENS = 3  # that each row draws
LEAVER = 0  # the row that is made to end with its first one
PLACES = 2  # for three prompts: the third comes in when the first has left


def trusted_sampler(policy: Policy) -> Policy:
    """The policy with those of the sampler's shortcuts that draw from the plain model's distribution. The plain model's
    log-probability of each drawn token is compared with what the sampler notes of it, and with what it was drawn by.

    Raises:
        Refused: none of the ways to sample does.
    """
    asked, policy = policy.decoding, replace(policy, decoding="segments")
    in_turn = replace(policy, rows_join=False)
    apart = replace(in_turn, prefill=False)
    whole = replace(apart, rows_leave=False)
    ways = [
        Way(policy),
        Way(in_turn, "prompts that take the places of ended rows"),
        Way(apart, "prompts read once a group"),
        Way(whole, "prompts read once a group and rows that leave"),
        Way(replace(whole, pads=False), "prompts read once a group, rows that leave and padding"),
        Way(replace(whole, pads=False, cached=False), "a cache (slow), padding and rows that leave"),
    ]
    long, again, short = probe_rows(policy).prompt_ids()

    def apart_by(way: Policy) -> float:
        torch.manual_seed(0)
        # Padded from the beginning, and by one column when it comes in; or both that are equal, side by side.
        prompts = [long, short, again] if way.rows_join else [long, again, short]
        with watched(policy.model, way.rows_leave) as found:
            samples = sample(exact(way), prompts, Sampling(TOKENS, TEMPERATURE), PLACES if way.rows_join else None)
        truth_NT = plain_logprobs(way, samples.rows, TEMPERATURE, together=True)
        found.append(largest_difference(samples.logp_NT, truth_NT, samples.rows))
        return float(torch.tensor(found).max())  # NaN where one of them is

    with undisturbed(policy):
        return trusted_decoding(replace(first_that_agrees(ways, "sampler", apart_by), decoding=asked))


def trusted_decoding(policy: Policy) -> Policy:
    """The policy, with another way to decode than in segments only if that draws the same tokens by the same numbers,
    notes their log-probabilities, and runs in the run's own precision, too."""
    segments = replace(policy, decoding="segments")
    if policy.decoding == "segments":
        return policy
    long, again, short = probe_rows(policy).prompt_ids()
    prompts, sampling = [long, short, again], Sampling(TOKENS, TEMPERATURE)

    def drawn_by(way: Policy) -> Samples:
        torch.manual_seed(0)
        return sample(way, prompts, sampling, PLACES)

    def apart_by(way: Policy) -> float:
        if way.decoding != "segments" and not (way.cached and "groups" in layouts(way.model)):
            raise ValueError("not each of its layers keeps every token")
        forms = list({form.precision: form for form in (exact(way), way)}.values())
        drawn = [drawn_by(form) for form in forms]
        off = [
            largest_difference(samples.logp_NT, plain_logprobs(form, samples.rows, TEMPERATURE, True), samples.rows)
            for form, samples in zip(forms, drawn, strict=True)
        ]
        # In half precision two right ways may part where two tokens are nearly as likely.
        same = forms[0].precision.autocast_dtype or drawn[0].rows.completion_ids() == expected
        return off[0] if same and off[-1] <= BOUNDS[way.precision.autocast_dtype] else math.inf

    expected = drawn_by(exact(segments)).rows.completion_ids()
    try:
        return first_that_agrees([Way(policy), Way(segments, f"{policy.decoding} decoding")], "sampler", apart_by)
    finally:  # what the trial has kept is not what the run will need
        policy.kept.clear()
        forget_pass(policy.model)


@contextmanager
def watched(model: Any, one_leaves: bool) -> Iterator[list[float]]:
    """For each call of `model.generate` within the block, the largest difference in nats between a token's noted
    log-probability and that by which the token that came out was drawn: after the temperature and the cuts. With
    `one_leaves`, the first call draws one token, and row LEAVER's is made an end of sequence afterwards.
    """
    found: list[float] = []
    generate = type(model).generate

    def watching(self: Any, **given: Any) -> Tensor:
        config, draw = given["generation_config"], given["logits_processor"][0]
        pick, drawn_by = draw.pick, []

        def watched_pick(weight_NV: Tensor, uniform_N1: Tensor) -> Tensor:
            drawn_by.append((weight_NV / weight_NV.sum(dim=-1, keepdim=True)).log())
            return pick(weight_NV, uniform_N1)  # type: ignore[no-any-return]

        draw.pick = watched_pick
        leaving = one_leaves and not found
        if leaving:
            config.max_new_tokens = 1
        longer: Tensor = generate(self, **given)
        noted_NT, logp_NTV = torch.stack(draw.logp, dim=1), torch.stack(drawn_by, dim=1)
        drawn_by_NT = logp_NTV.gather(-1, longer[:, -noted_NT.shape[1] :, None]).squeeze(-1)
        found.append(float((drawn_by_NT - noted_NT).abs().max()))
        if leaving:
            end = config.eos_token_id[0]
            longer[LEAVER, -1], draw.logp[-1][LEAVER] = end, logp_NTV[LEAVER, -1, end]
        return longer

    with patch.object(type(model), "generate", watching):
        yield found


def trusted(policy: Policy) -> Policy:
    """For GRPO, where sampler and learner must be one distribution: without dropout, and in train mode from then on.

    Raises:
        Refused: as `trusted_sampler` and `trusted_learner`.
    """
    policy = trusted_sampler(policy)
    without_dropout(policy.model)  # after a first pass, in which some models make new modules
    policy.model.train()  # gradient checkpointing works in no other mode
    return trusted_learner(policy)

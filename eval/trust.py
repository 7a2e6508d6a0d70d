"""The sampler's shortcuts, tried on the very model that was loaded (why: sft_core/learn/trust.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from eval.sampling import Samples, Sampling, sample
from sft_core.learn.trust import (
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
from sft_core.model.policy import Policy

TOKENS = 4  # that each row draws
LEAVER = 0  # the row that then ends at its second token


def trusted_sampler(policy: Policy) -> Policy:
    """The policy with those of the sampler's shortcuts that draw from the plain model's distribution. The plain model's
    log-probability of each drawn token is compared with what the sampler notes of it, and with what it was drawn by.

    Raises:
        Refused: none of the ways to sample does.
    """
    apart = replace(policy, prefill=False)
    whole = replace(apart, rows_leave=False)
    ways = [
        Way(policy),
        Way(apart, "prompts read once a group"),
        Way(whole, "prompts read once a group and rows that leave"),
        Way(replace(whole, pads=False), "prompts read once a group, rows that leave and padding"),
        Way(replace(whole, pads=False, cached=False), "a cache (slow), padding and rows that leave"),
    ]
    prompts = probe_rows(policy).prompt_ids()

    def drawn(way: Policy) -> Samples:
        torch.manual_seed(0)
        return sample(exact(way), prompts, Sampling(TOKENS, TEMPERATURE))

    def apart_by(way: Policy) -> float:
        with probabilities_kept(policy.model) as kept:
            first = drawn(replace(way, rows_leave=False))
        truth_NT = plain_logprobs(way, first.rows, TEMPERATURE)
        drawn_by_NT = torch.cat(kept)[:, : truth_NT.shape[1]]
        found = [largest_difference(logp_NT, truth_NT, first.rows) for logp_NT in (first.logp_NT, drawn_by_NT)]
        if way.rows_leave:
            end = int(first.rows.completion_NT[LEAVER, :2][-1])  # drawn again, as the seed is the same
            second = drawn(replace(way, eos_ids=(*way.eos_ids, end)))
            truth_NT = plain_logprobs(way, second.rows, TEMPERATURE)
            found.append(largest_difference(second.logp_NT, truth_NT, second.rows))
        return float(torch.tensor(found).max())  # NaN where one of them is

    with undisturbed(policy):
        return first_that_agrees(ways, "sampler", apart_by)


@contextmanager
def probabilities_kept(model: Any) -> Iterator[list[Tensor]]:
    """For each call of `model.generate` within the block, logp_NT (T = TOKENS) of the tokens by what they were drawn
    from: after the temperature and the cuts, of which a logits processor sees nothing."""
    kept: list[Tensor] = []
    generate = type(model).generate

    def keeping(self: Any, **given: Any) -> Tensor:
        given["generation_config"].update(output_scores=True, return_dict_in_generate=True)
        output = generate(self, **given)
        logp_NTV = torch.stack(output.scores, dim=1).float().log_softmax(dim=-1)
        drawn_NT = output.sequences[:, -logp_NTV.shape[1] :]
        logp_NT = logp_NTV.gather(-1, drawn_NT[..., None]).squeeze(-1)
        kept.append(torch.nn.functional.pad(logp_NT, (0, TOKENS - logp_NT.shape[1])))  # where all rows ended
        return output.sequences

    with patch.object(type(model), "generate", keeping):
        yield kept


def trusted(policy: Policy) -> Policy:
    """Learner and sampler.

    Raises:
        Refused: as `trusted_learner` and `trusted_sampler`.
    """
    return trusted_sampler(trusted_learner(policy))

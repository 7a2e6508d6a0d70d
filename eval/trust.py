"""The sampler's shortcuts, tried on the very model that was loaded (why: sft_core/learn/trust.py)."""

from __future__ import annotations

from dataclasses import replace

from eval.sampling import Sampling, sample
from sft_core.learn.trust import (
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

TOKENS = 6  # that each row draws at most
ENDING = 3  # one word in so many ends a row here, so that rows leave at different times


def trusted_sampler(policy: Policy) -> Policy:
    """The policy with those of the sampler's shortcuts that draw from the plain model's distribution: the
    log-probability that the sampler notes of each drawn token is compared with the plain model's.

    Raises:
        Refused: none of the ways to sample does.
    """
    separate = replace(policy, prefill=False)
    ways = [
        Way(policy),
        Way(separate, "prompts read once a group"),
        Way(replace(separate, rows_leave=False), "prompts read once a group and rows that leave"),
    ]
    prompts = probe_rows(policy).prompt_ids()
    ends = tuple(dict.fromkeys((*policy.eos_ids, *range(0, policy.vocabulary, ENDING))))

    def apart_by(way: Policy) -> float:
        samples = sample(replace(exact(way), eos_ids=ends), prompts, Sampling(TOKENS))
        return largest_difference(samples.logp_NT, plain_logprobs(way, samples.rows), samples.rows)

    with undisturbed(policy):
        return first_that_agrees(ways, "sampler", apart_by)


def trusted(policy: Policy) -> Policy:
    """Learner and sampler.

    Raises:
        Refused: as `trusted_learner` and `trusted_sampler`.
    """
    return trusted_sampler(trusted_learner(policy))

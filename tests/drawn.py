"""Samples that have in them what a test is about, whatever random weights a version of the libraries makes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from eval.samples import Samples
from grpo_core.config import GRPOConfig
from grpo_core.step import sample_groups
from sft_core.model.policy import Policy
from tests.helpers import EXAMPLES

TRIES = 100


def samples_where(holds: Callable[[Samples], bool], policy: Policy, config: GRPOConfig, seed: int) -> Samples:
    """The first samples of EXAMPLES for which it holds, from this seed on."""
    for tried in range(seed, seed + TRIES):
        torch.manual_seed(tried)
        samples = sample_groups(policy, EXAMPLES, config)
        if holds(samples):
            return samples
    raise AssertionError(f"none of {TRIES} seeds draws such samples")


def of_many_lengths(samples: Samples) -> bool:
    """At least four lengths, and some completions, but not all, cut off by the budget."""
    cut = samples.truncated_N
    return bool(cut.any() and not cut.all() and samples.rows.completion_len_N.unique().numel() > 3)


def some_cut_off(samples: Samples) -> bool:
    return bool(samples.truncated_N.any() and not samples.truncated_N.all())

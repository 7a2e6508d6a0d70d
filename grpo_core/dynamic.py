"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), bounded: groups of equal rewards teach nothing and are
replaced by groups of further prompts, up to `dynamic_sampling` times. Groups still equal then stay in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from eval.samples import Samples
from grpo_core.config import GRPOConfig
from grpo_core.objective import all_equal
from grpo_core.step import Learner, Rollout, sample_and_score
from grpo_core.variants import values_and_weights
from sft_core.learn.clock import Stopwatch
from sft_core.learn.rows import pack_rows
from sft_core.text.example import Example

Draw = Callable[[int], Sequence[Example]]  # so many further examples of the task


def replacing_equal_groups(more: Draw) -> Callable[[Learner, Sequence[Example], Stopwatch], Rollout]:
    """`Learner.roll_out` under --dynamic_sampling; `more` gives further examples."""

    def roll_out(learner: Learner, examples: Sequence[Example], clock: Stopwatch) -> Rollout:
        rollout = sample_and_score(learner, examples, clock)
        for _ in range(learner.config.dynamic_sampling):
            equal_B = equal_groups(rollout, learner.config)
            if not equal_B.any():
                break
            rollout = _substituted(rollout, equal_B, sample_and_score(learner, more(int(equal_B.sum())), clock))
        return rollout

    return roll_out


def equal_groups(rollout: Rollout, config: GRPOConfig) -> Tensor:
    """True for the groups that teach nothing: those of equal rewards, or, where each reward function is normalised
    separately, those in which every function gives equal values."""
    if config.reward_aggregation == "sum_then_normalize":
        return all_equal(rollout.reward_BG)
    value_KBG, _ = values_and_weights(rollout.scores, rollout.reward_BG)
    return torch.stack([all_equal(value_BG) for value_BG in value_KBG]).all(dim=0)


def _substituted(rollout: Rollout, equal_B: Tensor, fresh: Rollout) -> Rollout:
    """The rollout with each group of `equal_B` replaced by the next one of `fresh`."""
    B, G = rollout.reward_BG.shape
    source_B = torch.arange(B)  # where group b of the result is among the old groups followed by the fresh ones
    source_B[equal_B] = B + torch.arange(int(equal_B.sum()))
    rows = [group * G + i for group in source_B.tolist() for i in range(G)]
    examples = [*rollout.examples, *fresh.examples]
    return Rollout(
        [examples[group] for group in source_B.tolist()],
        joined(rollout.samples, fresh.samples, rows),
        rollout.scores.followed_by(fresh.scores).reordered(rows),
        torch.cat([rollout.reward_BG, fresh.reward_BG])[source_B],
        rollout.replaced + int(equal_B.sum()),
    )


def joined(samples: Samples, others: Samples, rows: Sequence[int]) -> Samples:
    """The numbered rows of both batches, the others counted after the first, padded to their common width."""
    prompts = samples.rows.prompt_ids() + others.rows.prompt_ids()
    completions = samples.rows.completion_ids() + others.rows.completion_ids()
    logps = [*samples.logp_NT, *others.logp_NT]  # each as wide as its own batch, so a longest row's is long enough
    device, texts = samples.rows.ids_NL.device, samples.texts + others.texts
    # Which id fills the padding does not matter: masks come from lengths.
    packed = pack_rows([prompts[row] for row in rows], [completions[row] for row in rows], pad_id=0).to(device)
    T = packed.mask_NT.shape[1]
    logp_NT = pad_sequence([logps[row] for row in rows], batch_first=True)[:, :T]
    truncated_N = torch.cat([samples.truncated_N, others.truncated_N])[list(rows)]
    return Samples(packed, [texts[row] for row in rows], truncated_N, logp_NT)

"""Completions from a policy, through `model.generate`: drawn, unless top-k, top-p or min-p cut it, from just the
distribution that the learner scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, TextStreamer

from eval.generation import generate
from sft_core.policy import Policy
from sft_core.rows import Rows, pack_rows, pad


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

    def followed_by(self, other: Samples, rows: Sequence[int]) -> Samples:
        """The numbered rows of both batches, the other's counted after this one's, padded anew."""
        prompts = self.rows.prompt_ids() + other.rows.prompt_ids()
        completions = self.rows.completion_ids() + other.rows.completion_ids()
        logps = [*self.logp_NT, *other.logp_NT]  # each as wide as its own batch, so a longest row's is long enough
        device, texts = self.rows.ids_NL.device, self.texts + other.texts
        # Which id fills the padding does not matter: masks come from lengths.
        joined = pack_rows([prompts[row] for row in rows], [completions[row] for row in rows], pad_id=0).to(device)
        T = joined.mask_NT.shape[1]
        logp_NT = pad_sequence([logps[row] for row in rows], batch_first=True)[:, :T]
        truncated_N = torch.cat([self.truncated_N, other.truncated_N])[list(rows)]
        return Samples(joined, [texts[row] for row in rows], truncated_N, logp_NT)


def sample(
    policy: Policy, prompts: Sequence[Sequence[int]], sampling: Sampling, streamer: TextStreamer | None = None
) -> Samples:
    """One completion for each prompt (token lists), all in one batch; a single one is shown to `streamer` on its way.

    The model's shipped generation settings (repetition penalty, top-k, top-p) are not inherited: a policy gradient
    needs samples of the policy itself, and an evaluation the same decoding for every model.
    """
    greedy = sampling.temperature == 0
    config = GenerationConfig(
        max_new_tokens=sampling.max_completion_tokens,
        do_sample=not greedy,
        eos_token_id=list(policy.eos_ids),
        pad_token_id=policy.pad_id,
    )
    if not greedy:
        config.update(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        config.update(min_p=sampling.min_p or None)
    prompt_NP = pad(prompts, policy.pad_id, "left").to(policy.device)
    prompt_len_N = torch.tensor([len(p) for p in prompts], device=policy.device)
    completion_NT, logp_NT = generate(policy, prompts, prompt_NP, prompt_len_N, config, sampling.temperature, streamer)
    completion_len_N, ended_N = completion_lengths(completion_NT, policy.eos_ids)
    rows = Rows(torch.cat([prompt_NP, completion_NT], dim=1), prompt_len_N, completion_len_N, prompt_NP.shape[1])
    if not greedy:
        logp_NT = torch.where(rows.mask_NT, logp_NT, 0.0)
    return Samples(rows, decode(policy, rows), ~ended_N, logp_NT)


def completion_lengths(completion_NT: Tensor, eos_ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Length up to and including the first end-of-sequence id, and whether there was one. What follows is filler.

    >>> lengths, ended = completion_lengths(torch.tensor([[5, 2, 2], [5, 6, 7], [3, 5, 2]]), eos_ids=[2, 3])
    >>> lengths.tolist(), ended.tolist()
    ([2, 3, 1], [True, False, True])
    """
    is_eos_NT = torch.isin(completion_NT, torch.tensor(list(eos_ids), device=completion_NT.device))
    ended_N = is_eos_NT.any(dim=1)
    first_N = is_eos_NT.int().argmax(dim=1) + 1  # argmax finds the first of equal values
    return torch.where(ended_N, first_N, completion_NT.shape[1]), ended_N


def decode(policy: Policy, rows: Rows) -> list[str]:
    """Each completion's text without special tokens."""
    return list(policy.tokenizer.batch_decode(rows.completion_ids(), skip_special_tokens=True))

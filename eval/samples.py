"""Completions while they are drawn, and when all are there; exchanged under torchrun."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sft_core.learn import ranks
from sft_core.learn.rows import Rows, pad
from sft_core.model.policy import Policy
from sft_core.model.sending import sent


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


class Sheet:
    """The completions of N prompts while they are drawn; all of it on the CPU, but for the log-probabilities."""

    def __init__(self, policy: Policy, N: int, sampling: Sampling, ended: Ended | None) -> None:
        device = policy.device
        self.policy, self.sampling, self.tell = policy, sampling, ended
        self.texts = [""] * N
        self.length_N = torch.zeros(N, dtype=torch.long)
        self.truncated_N = torch.zeros(N, dtype=torch.bool)
        self.completion_NT = torch.full((N, sampling.max_completion_tokens), policy.pad_id)
        drawn_NT = self.completion_NT.shape if sampling.temperature else (N, 0)
        self.logp_NT = torch.zeros(drawn_NT, device=device)  # at the temperature, before any cut
        wide = torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs lack
        # By which each token is drawn; from the CPU: the same on every device.
        self.uniform_NT = torch.rand(drawn_NT, dtype=wide)

    def numbers(self, place_N1: Tensor, column_NT: Tensor) -> Tensor:
        """uniform_NT of these tokens, on the device; empty when greedy."""
        uniform_NT = self.uniform_NT[place_N1, column_NT] if self.sampling.temperature else self.uniform_NT
        return sent(uniform_NT, self.policy.device)

    def write(self, place_N1: Tensor, column_NT: Tensor, drawn_NT: Tensor, logp: Sequence[Tensor]) -> None:
        """Put down the next tokens of some rows."""
        self.completion_NT[place_N1, column_NT] = drawn_NT
        if self.sampling.temperature:
            at = sent(place_N1, self.policy.device), sent(column_NT, self.policy.device)
            self.logp_NT[at] = torch.stack(list(logp), dim=1)

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
        if ranks.world() == 1:
            return
        drawn = (list(mine), self.completion_NT[mine], self.logp_NT[mine].cpu())
        for number, (places, completion_NT, logp_NT) in enumerate(ranks.gathered(drawn, "completions")):
            if number != ranks.rank():
                self.completion_NT[places] = completion_NT
                self.logp_NT[places] = logp_NT.to(self.logp_NT.device)
                self.ended(torch.tensor(places, dtype=torch.long))

    def samples(self, prompts: Sequence[Sequence[int]]) -> Samples:
        """All of them, when all have ended."""
        prompt_NP, prompt_len_N = pad(prompts, self.policy.pad_id, "left"), torch.tensor([len(p) for p in prompts])
        T = int(self.length_N.max())
        ids_NL = torch.cat([prompt_NP, self.completion_NT[:, :T]], dim=1)
        rows = Rows(ids_NL, prompt_len_N, self.length_N, prompt_NP.shape[1]).to(self.policy.device)
        greedy = not self.sampling.temperature
        logp_NT = self.logp_NT if greedy else torch.where(rows.mask_NT, self.logp_NT[:, :T], 0.0)
        return Samples(rows, self.texts, sent(self.truncated_N, self.policy.device), logp_NT)


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

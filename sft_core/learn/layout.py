"""How a micro-batch lies in memory for the learner: each prompt once, with all of its completions.

As one sequence, where the model allows it, attention takes them apart: sft_core.model.segments. As groups, a row for
each prompt, a mask hides the completions from one another; here two of one prompt:

    ids         q  q  q  a  b  e  c  e            a b e and c e answer q q q
    position    0  1  2  3  4  5  3  4            each completion continues after the prompt
    attention   1  .  .  .  .  .  .  .
                1  1  .  .  .  .  .  .
                1  1  1  .  .  .  .  .
                1  1  1  1  .  .  .  .            a sees the prompt and itself
                1  1  1  1  1  .  .  .
                1  1  1  1  1  1  .  .
                1  1  1  .  .  .  1  .            c sees the prompt, not the other completion
                1  1  1  .  .  .  1  1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sft_core.learn.rows import Rows, pad
from sft_core.model.segments import Batch, Layout, Segments
from sft_core.model.sending import sent


@dataclass(frozen=True)
class Packed:
    """R packed rows of width L, padded on the right, and where in them each of the M completion tokens is predicted."""

    ids_RL: Tensor  # R is 1 where all lies in one sequence
    position_RL: Tensor
    attention: Tensor  # (R, L), or (R, 1, L, L) bool where a mask keeps a row's completions apart
    predictor_M: Tensor  # index into the flattened (R * L): the token before, for the first the prompt's last
    token_M: Tensor  # the completion tokens themselves, one row behind the other
    place_M: Tensor  # index into the flattened (N * T)
    segments: Segments | None = None  # of one sequence


# A batch of rows for attention wastes fewer (query, key) pairs than this on padding: a call of its own takes as long.
WASTE = 128**2
# Keys in a block of torch's kernels for attention: 512 on a CPU (kvSplitSize in aten/src/ATen/native/cpu/
# FlashAttentionKernel.cpp, torch 2.13), about 128 on a GPU. A row of no more keys gains nothing from being causal.
KEY_BLOCK = {"cpu": 512, "cuda": 128}
# A token's other layers cost about as much as its attention to so many keys: 24 D^2 flops and 4 D a key, D = 896.
KEYS_A_TOKEN = 5400

Group = tuple[list[int], list[list[int]]]  # a prompt and its completions


def pack(rows: Rows, layout: Layout) -> Packed:
    """Lay out a micro-batch. Consecutive rows with the same prompt share it, unless `layout` is "rows", or is "groups"
    and the mask over them would cost more than it saves."""
    apart: list[Group] = [(prompt, [completion]) for prompt, completion in rows.lists]
    groups: list[Group] = []
    for prompt, completion in rows.lists:
        if groups and groups[-1][0] == prompt:
            groups[-1][1].append(completion)
        else:
            groups.append((prompt, [completion]))
    if layout == "rows" or (layout == "groups" and _cost(groups) > _cost(apart)):
        groups = apart
    device, T = rows.ids_NL.device, rows.completion_NT.shape[1]
    block = KEY_BLOCK.get(device.type, 128)
    *parts, cut = _one_sequence(groups, block) if layout == "sequence" else _a_row_each(groups)
    completions = rows.completion_ids()
    tokens = [token for completion in completions for token in completion]
    places = [n * T + t for n, completion in enumerate(completions) for t in range(len(completion))]
    own = [torch.tensor(numbers, dtype=torch.long) for numbers in (tokens, places)]
    ids_RL, position_RL, attention, predictor_M, token_M, place_M = (sent(part, device) for part in (*parts, *own))
    return Packed(ids_RL, position_RL, attention, predictor_M, token_M, place_M, cut and cut.to(device))


def _cost(groups: list[Group]) -> float:
    """Of a row for each group, in tokens: with padding, and with attention, which is whole under a mask, else half."""
    masked = any(len(completions) > 1 for _, completions in groups)
    L = max(len(prompt) + sum(map(len, completions)) for prompt, completions in groups)
    return len(groups) * L * (1 + (L if masked else L / 2) / KEYS_A_TOKEN)


Parts = tuple[Tensor, Tensor, Tensor, Tensor, Segments | None]  # ids, positions, attention, predictors and segments


def _one_sequence(groups: list[Group], block: int) -> Parts:
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    rows: list[Row] = []
    for prompt, completions in groups:
        P, prompt_at = len(prompt), range(len(ids), len(ids) + len(prompt))
        ids += prompt
        positions += range(P)
        told = []
        for completion in filter(None, completions):
            told.append(range(len(ids), len(ids) + len(completion)))
            predictors += [prompt_at[-1], *told[-1][:-1]]
            ids += completion
            positions += range(P, P + len(completion))
        rows += rows_of_group(prompt_at, told, block)
    tensors = (torch.tensor([ids]), torch.tensor([positions]), torch.ones(1, len(ids), dtype=torch.long))
    return *tensors, torch.tensor(predictors, dtype=torch.long), segments(rows, len(ids))


class Row(NamedTuple):
    """A row of attention: the places of its tokens in the sequence, and how many of them are keys alone."""

    places: tuple[int, ...]
    before: int

    @property
    def pairs(self) -> int:
        return (len(self.places) - self.before) * len(self.places)


def rows_of_group(prompt: range, completions: Sequence[range], block: int) -> list[Row]:
    """A row for each completion behind its prompt; or one for the prompt and, for each completion, one in which the
    prompt's tokens are keys alone.

    >>> [(len(row.places), row.before) for row in rows_of_group(range(9), [range(9, 12), range(12, 13)], block=512)]
    [(9, 0), (12, 9), (10, 9)]
    >>> [(len(row.places), row.before) for row in rows_of_group(range(2), [range(2, 900)], block=512)]
    [(900, 0)]
    """
    P = len(prompt)
    before = P if prompts_are_keys_alone(P, [len(completion) for completion in completions], block) else 0
    rows = [Row((*prompt, *completion), before) for completion in completions]
    return [Row((*prompt,), 0), *rows] if before or not rows else rows


def prompts_are_keys_alone(P: int, completions: Sequence[int], block: int) -> bool:
    """Whether that is fewer pairs of query and key to compute than rows in which a prompt's tokens are queries as well.
    Of such rows, in which nobody looks at what comes later, the kernel leaves out whole blocks of so many keys."""

    def causal(L: int) -> float:
        return L * min(L, (L + block) / 2)

    return causal(P) + sum(T * (P + T) for T in completions) < sum(causal(P + T) for T in completions)


def segments(rows: Sequence[Row], S: int) -> Segments:
    """The rows of a sequence of S tokens in batches, and the way back to the sequence."""
    batches, query_at, key_at = [], [], []
    place_S, start = [0] * S, 0
    for batch in batched([row for row in rows if not row.before]) + batched([row for row in rows if row.before]):
        queries = [row.places[row.before :] for row in batch]
        query_NQ, key_NK = pad(queries, 0, "right"), pad([row.places for row in batch], 0, "right")
        query_at.append(query_NQ.flatten())
        key_at.append(key_NK.flatten())
        before_N = torch.tensor([row.before for row in batch]) if batch[0].before else None
        batches.append(Batch(len(batch), query_NQ.shape[1], key_NK.shape[1], before_N))
        for places in queries:
            for number, place in enumerate(places, start):  # of a prompt in several rows, the last
                place_S[place] = number
            start += query_NQ.shape[1]
    return Segments(tuple(batches), torch.cat(query_at), torch.cat(key_at), torch.tensor(place_S))


def batched(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of like sizes share a call of attention, while their padding costs less than another call."""
    batches: list[list[Row]] = []
    Q = K = pairs = 0
    for row in sorted(rows, key=lambda row: -row.pairs):
        queries, keys = max(Q, len(row.places) - row.before), max(K, len(row.places))
        pairs += row.pairs
        if not batches or (len(batches[-1]) + 1) * queries * keys - pairs >= WASTE:
            batches.append([])
            queries, keys, pairs = len(row.places) - row.before, len(row.places), row.pairs
        batches[-1].append(row)
        Q, K = queries, keys
    return batches


def _a_row_each(groups: list[Group]) -> Parts:
    L = max(len(prompt) + sum(map(len, completions)) for prompt, completions in groups)
    ids, positions, parts, predictors = [], [], [], []
    for row, (prompt, completions) in enumerate(groups):
        P, at = len(prompt), row * L + len(prompt)
        ids.append(prompt + [token for completion in completions for token in completion])
        positions.append([*range(P), *(P + t for completion in completions for t in range(len(completion)))])
        parts.append([0] * P + [number for number, completion in enumerate(completions, 1) for _ in completion])
        for completion in completions:
            if completion:
                predictors += [row * L + P - 1, *range(at, at + len(completion) - 1)]
            at += len(completion)
    part_RL = pad(parts, -1, "right")  # 0: prompt; 1, 2, ...: completions; -1: padding
    alone = all(len(completions) == 1 for _, completions in groups)
    attention = (part_RL >= 0).long() if alone else _attention(part_RL)
    predictor_M = torch.tensor(predictors, dtype=torch.long)
    return pad(ids, 0, "right"), pad(positions, 0, "right"), attention, predictor_M, None


def _attention(part_RL: Tensor) -> Tensor:
    """Causal, within the prompt and the token's own completion; padding sees itself, so that no softmax is empty."""
    query, key = part_RL[:, :, None], part_RL[:, None, :]
    causal = torch.ones(part_RL.shape[1], part_RL.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]

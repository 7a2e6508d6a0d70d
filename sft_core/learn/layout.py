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

from dataclasses import dataclass

import torch
from torch import Tensor

from sft_core.learn.rows import Rows, pad
from sft_core.model.segments import Layout, Row, Segments, segments


@dataclass(frozen=True)
class Packed:
    """R packed rows of width L, padded on the right, and where in them each of the M completion tokens is predicted."""

    ids_RL: Tensor  # R is 1 where all lies in one sequence
    position_RL: Tensor
    attention: Tensor  # (R, L), or (R, 1, L, L) bool where a mask keeps a row's completions apart
    predictor_M: Tensor  # index into the flattened (R * L): the token before, for the first the prompt's last
    segments: Segments | None = None  # of one sequence


# A token's other layers cost about as much as its attention to so many keys: 24 D^2 flops and 4 D a key, D = 896.
KEYS_A_TOKEN = 5400

Group = tuple[list[int], list[list[int]]]  # a prompt and its completions


def pack(rows: Rows, layout: Layout) -> Packed:
    """Lay out a micro-batch. Consecutive rows with the same prompt share it, unless `layout` is "rows", or is "groups"
    and the mask over them would cost more than it saves."""
    pairs = list(zip(rows.prompt_ids(), rows.completion_ids(), strict=True))
    apart: list[Group] = [(prompt, [completion]) for prompt, completion in pairs]
    groups: list[Group] = []
    for prompt, completion in pairs:
        if groups and groups[-1][0] == prompt:
            groups[-1][1].append(completion)
        else:
            groups.append((prompt, [completion]))
    if layout == "rows" or (layout == "groups" and _cost(groups) > _cost(apart)):
        groups = apart
    packed = _one_sequence(groups) if layout == "sequence" else _a_row_each(groups)
    parts = (packed.ids_RL, packed.position_RL, packed.attention, packed.predictor_M)
    ids_RL, position_RL, attention, predictor_M = (part.to(rows.ids_NL.device) for part in parts)
    return Packed(ids_RL, position_RL, attention, predictor_M, packed.segments)


def _cost(groups: list[Group]) -> float:
    """Of a row for each group, in tokens: with padding, and with attention, which is whole under a mask, else half."""
    masked = any(len(completions) > 1 for _, completions in groups)
    L = max(len(prompt) + sum(map(len, completions)) for prompt, completions in groups)
    return len(groups) * L * (1 + (L if masked else L / 2) / KEYS_A_TOKEN)


def _one_sequence(groups: list[Group]) -> Packed:
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    lengths: list[int] = []
    rows: list[Row] = []
    for prompt, completions in groups:
        first, P = len(ids), len(prompt)
        ids += prompt
        positions += range(P)
        told = [completion for completion in completions if completion]
        number = len(lengths)
        if len(told) == 1:  # prompt and completion are one piece
            lengths.append(P + len(told[0]))
            rows.append(Row(number))
        else:
            lengths += [P, *map(len, told)]
            rows += [Row(number, number + 1 + i) for i in range(len(told))] or [Row(number)]
        for completion in told:
            predictors += [first + P - 1, *range(len(ids), len(ids) + len(completion) - 1)]
            ids += completion
            positions += range(P, P + len(completion))
    tensors = (torch.tensor([ids]), torch.tensor([positions]), torch.ones(1, len(ids), dtype=torch.long))
    return Packed(*tensors, torch.tensor(predictors, dtype=torch.long), segments(lengths, rows))


def _a_row_each(groups: list[Group]) -> Packed:
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
    return Packed(pad(ids, 0, "right"), pad(positions, 0, "right"), attention, predictor_M)


def _attention(part_RL: Tensor) -> Tensor:
    """Causal, within the prompt and the token's own completion; padding sees itself, so that no softmax is empty."""
    query, key = part_RL[:, :, None], part_RL[:, None, :]
    causal = torch.ones(part_RL.shape[1], part_RL.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]

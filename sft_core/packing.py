"""How rows go through the model: completions of one prompt side by side behind it, so that it is encoded once.

A group of G completions of one prompt as G rows computes the prompt G times. Packed, it is one row; here G = 2:

    ids         q  q  q  a  b  e  c  e            a b e and c e answer q q q
    position    0  1  2  3  4  5  3  4            each completion continues behind the prompt
    attention   1  .  .  .  .  .  .  .
                1  1  .  .  .  .  .  .
                1  1  1  .  .  .  .  .
                1  1  1  1  .  .  .  .            a sees the prompt and itself
                1  1  1  1  1  .  .  .
                1  1  1  1  1  1  .  .
                1  1  1  .  .  .  1  .            c sees the prompt, not the other completion
                1  1  1  .  .  .  1  1

The token at `predictor` predicts each completion token: the one before it, and the prompt's last for the first. Packed
rows of a micro-batch are padded on the right, where nothing looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sft_core.rows import Rows


@dataclass(frozen=True)
class Packed:
    """R packed rows of width L, and where in them each of the micro-batch's M completion tokens is predicted."""

    ids_RL: Tensor
    position_RL: Tensor
    attention: Tensor  # (R, L), or (R, 1, L, L) bool where a row holds several completions
    predictor_M: Tensor  # index into the flattened (R * L)


def pack(rows: Rows, share_prompts: bool) -> Packed:
    """Lay out a micro-batch. Completions share a prompt where consecutive rows have the same one."""
    groups: list[tuple[list[int], list[list[int]]]] = []
    for prompt, completion in zip(rows.prompt_ids(), rows.completion_ids(), strict=True):
        if share_prompts and groups and groups[-1][0] == prompt:
            groups[-1][1].append(completion)
        else:
            groups.append((prompt, [completion]))
    L = max(len(prompt) + sum(map(len, completions)) for prompt, completions in groups)
    ids_RL, position_RL = torch.zeros(2, len(groups), L, dtype=torch.long)
    segment_RL = torch.full((len(groups), L), -1)  # 0: prompt; 1, 2, ...: completions; -1: padding
    predictors: list[int] = []
    for row, (prompt, completions) in enumerate(groups):
        at = len(prompt)
        ids_RL[row, :at] = torch.tensor(prompt)
        position_RL[row, :at] = torch.arange(at)
        segment_RL[row, :at] = 0
        for number, completion in enumerate(completions, start=1):
            end = at + len(completion)
            ids_RL[row, at:end] = torch.tensor(completion, dtype=torch.long)
            position_RL[row, at:end] = torch.arange(len(prompt), len(prompt) + len(completion))
            segment_RL[row, at:end] = number
            if completion:
                predictors += [row * L + len(prompt) - 1, *range(row * L + at, row * L + end - 1)]
            at = end
    alone = all(len(completions) == 1 for _, completions in groups)
    attention = (segment_RL >= 0).long() if alone else _attention(segment_RL)
    device, predictor_M = rows.ids_NL.device, torch.tensor(predictors, dtype=torch.long)
    return Packed(ids_RL.to(device), position_RL.to(device), attention.to(device), predictor_M.to(device))


def _attention(segment_RL: Tensor) -> Tensor:
    """Causal, and to the prompt and the own completion only; padding sees itself, so that no softmax is empty."""
    query, key = segment_RL[:, :, None], segment_RL[:, None, :]
    causal = torch.ones(segment_RL.shape[1], segment_RL.shape[1], dtype=torch.bool).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]

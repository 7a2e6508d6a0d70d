"""The rows that are being drawn.

    q q q q a b      a row that has drawn two tokens
    . . q q a b
    . . . q q q      one that has just taken the place of a row that ended

All of them end at one column, so that one pass draws the next token of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as widened  # by a negative number: narrowed
from transformers import DynamicCache

from eval.cache import room_for
from sft_core.learn.rows import pad
from sft_core.model.backbone import backbone_and_head
from sft_core.model.policy import Policy
from sft_core.model.sending import sent


@dataclass
class Going:
    """n rows of W tokens each, padding included. The cache, where there is one, lacks at least the last column. What is
    decided about the rows is decided on the host, by what stays on the CPU."""

    place_N: Tensor  # of the rows among all that are to be drawn; on the CPU
    prompt_len_N: Tensor  # on the CPU
    drawn_N: Tensor  # how many tokens of each row are no prompt; on the CPU
    ids_NW: Tensor
    attention_NW: Tensor  # 1 on tokens, 0 on padding
    cache: Any  # None: `generate` makes one of the model's own kind

    @staticmethod
    def begin(policy: Policy, model: Any, prompts: Sequence[Sequence[int]], places: Sequence[int], room: int) -> Going:
        """Rows of which nothing is drawn yet; their prompts are read here, if the policy can do that once a group.
        `room`: how many tokens each may draw."""
        device, texts = policy.device, [prompts[place] for place in places]
        ids_NW = sent(pad(texts, policy.pad_id, "left"), device)
        W, prompt_len_N = ids_NW.shape[1], torch.tensor([len(text) for text in texts])
        attention_NW = sent((torch.arange(W) >= W - prompt_len_N[:, None]).long(), device)
        cache = DynamicCache(config=policy.model.config) if policy.prefill or policy.rows_leave else None
        if cache is not None:
            room_for(cache, W + room, policy.model, policy.precision.autocast_dtype)
        if policy.prefill:
            prefill_once(cache, model, texts, ids_NW, attention_NW)
        drawn_N = torch.zeros_like(prompt_len_N)
        return Going(torch.tensor(places), prompt_len_N, drawn_N, ids_NW, attention_NW, cache)

    def __len__(self) -> int:
        return len(self.place_N)

    def drew(self, longer_NW: Tensor) -> None:
        """All rows have become longer."""
        more = longer_NW.shape[1] - self.ids_NW.shape[1]
        self.ids_NW, self.drawn_N = longer_NW, self.drawn_N + more
        self.attention_NW = widened(self.attention_NW, (0, more), value=1)

    def keep(self, which: Tensor) -> None:
        """The numbered rows go on, the others leave. `which`: on the CPU."""
        self.place_N, self.drawn_N = self.place_N[which], self.drawn_N[which]
        self.prompt_len_N, which = self.prompt_len_N[which], sent(which, self.ids_NW.device)
        self.ids_NW, self.attention_NW = self.ids_NW[which], self.attention_NW[which]
        if self.cache is not None and len(self):
            self.cache.batch_select_indices(which)

    def joined_by(self, others: Going) -> Going:
        """These rows and others, of which nothing is drawn yet. Columns that are padding in all of them go."""
        if not len(self):
            return others
        width = max(int((rows.prompt_len_N + rows.drawn_N).max()) for rows in (self, others))

        def both(own_NW: Tensor, their_NW: Tensor) -> Tensor:
            return torch.cat([widened(rows_NW, (width - rows_NW.shape[1], 0)) for rows_NW in (own_NW, their_NW)])

        for layer, other in zip(self.cache.layers, others.cache.layers, strict=True):
            layer.join(other, width - 1, len(others))
        return Going(
            torch.cat([self.place_N, others.place_N]),
            torch.cat([self.prompt_len_N, others.prompt_len_N]),
            torch.cat([self.drawn_N, others.drawn_N]),
            both(self.ids_NW, others.ids_NW),
            both(self.attention_NW, others.attention_NW),
            self.cache,
        )


def prefill_once(
    cache: Any, model: Any, prompts: Sequence[Sequence[int]], prompt_NP: Tensor, attention_NP: Tensor
) -> None:
    """Fill the cache with each row's prompt except its last token, computed once for consecutive equal prompts."""
    if prompt_NP.shape[1] == 1:
        return
    first = [row for row in range(len(prompts)) if row == 0 or prompts[row] != prompts[row - 1]]
    first_R, device = sent(torch.tensor(first), prompt_NP.device), prompt_NP.device
    attention_RP = attention_NP[first_R]
    backbone, _ = backbone_and_head(model)
    backbone(
        input_ids=prompt_NP[first_R, :-1],
        attention_mask=attention_RP[:, :-1],
        position_ids=(attention_RP.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],
        past_key_values=cache,
        use_cache=True,
    )
    begins = torch.zeros(len(prompts), dtype=torch.long)
    begins[first[1:]] = 1
    cache.batch_select_indices(sent(begins.cumsum(dim=0), device))

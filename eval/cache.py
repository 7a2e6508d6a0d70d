"""A cache of keys and values that is allocated once, instead of copied for each token that is added. It holds them in
the precision in which attention reads them, so that they are not cast for each token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from sft_core.model.segments import NAME


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values at the beginning of tensors with room for `tokens` tokens, of their own dtype or of another."""

    def __init__(self, tokens: int, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.tokens, self.as_dtype = tokens, dtype
        self.room: dict[str, Tensor] = {}
        self.filled: dict[str, Tensor] = {}  # the parts of `room` that were given out

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add the next tokens' (N, heads, tokens, size); return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._longer("keys", self.keys, key_states)
        self.values = self._longer("values", self.values, value_states)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._move()

    def join(self, other: RoomyLayer, width: int, rows: int) -> None:
        """`rows` more rows come in, those of another layer, which is empty where their prompts are of one token. The
        last tokens stand side by side, and of the earlier ones so many stay that there are `width`."""

        def wide(held: Tensor) -> Tensor:
            return torch.nn.functional.pad(held, (0, 0, width - held.shape[-2], 0))

        for name in ("keys", "values"):
            own, theirs = wide(getattr(self, name)), getattr(other, name) if other.is_initialized else None
            more = own.new_zeros(rows, *own.shape[1:]) if theirs is None else wide(theirs)
            setattr(self, name, torch.cat([own, more]))
        self._move()

    def _move(self) -> None:
        """The next token brings new room: the old must not stay beside what was taken from it."""
        self.room.clear()
        self.filled.clear()

    def _longer(self, name: str, held: Tensor | None, new: Tensor) -> Tensor:
        width = 0 if held is None or not held.numel() else held.shape[-2]
        end = width + new.shape[-2]
        if held is not self.filled.get(name) or end > self.room[name].shape[-2]:
            # The first tokens, or rows were selected since: what is held lies elsewhere.
            N, heads, _, size = new.shape
            self.room[name] = new.new_empty((N, heads, max(self.tokens, end), size), dtype=self.as_dtype)
            if held is not None and width:
                self.room[name][:, :, :width] = held
        self.room[name][:, :, width:end] = new
        self.filled[name] = self.room[name][:, :, :end]
        return self.filled[name]


def room_for(cache: DynamicCache, tokens: int, model: Any, autocast_dtype: torch.dtype | None) -> None:
    """Give the cache's layers that keep every token room for so many; others (windows, recurrent states) stay."""
    dtype = held_dtype(model, autocast_dtype)
    layers = [RoomyLayer(tokens, dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    cache.layers = layers


def held_dtype(model: Any, autocast_dtype: torch.dtype | None) -> torch.dtype | None:
    """Of keys and values in a cache; None: as they come. Autocast casts what goes into `scaled_dot_product_attention`;
    other attention may use keys in full precision."""
    return autocast_dtype if model.config._attn_implementation in ("sdpa", NAME) else None

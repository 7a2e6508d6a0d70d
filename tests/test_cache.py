"""The sampler's cache (eval/cache.py): what transformers' own holds, in tensors that are allocated once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eval.cache import RoomyLayer, room_for
from tests.helpers import tiny_policy


def some(tokens: int, rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 2, tokens, 3, generator=torch.Generator().manual_seed(seed))


def test_it_holds_what_a_growing_cache_holds_whatever_is_done_to_its_rows() -> None:
    plain, roomy = DynamicLayer(), RoomyLayer(12, None)
    steps: list[Any] = [5, 1, 1, torch.tensor([0, 2, 3]), 1, torch.tensor([0, 0, 1, 2]), 1, 1, 1, 5]
    rows = 4
    for number, step in enumerate(steps):
        if isinstance(step, int):
            given = some(step, rows, number), some(step, rows, number + 100)
            both = [layer.update(*given) for layer in (plain, roomy)]
            assert all(torch.equal(*pair) for pair in zip(*both, strict=True))
        else:
            rows = len(step)
            for layer in (plain, roomy):
                layer.batch_select_indices(step)
        assert torch.equal(plain.keys, roomy.keys) and torch.equal(plain.values, roomy.values)
        assert plain.get_seq_length() == roomy.get_seq_length()
    assert roomy.get_seq_length() == 16  # more than it had room for


def test_what_a_row_added_before_it_was_selected_is_not_written_over() -> None:
    layer = RoomyLayer(10, None)
    keys, _ = layer.update(some(3), some(3))
    before = keys.clone()
    layer.batch_select_indices(torch.tensor([1, 2]))
    layer.update(some(2, rows=2, seed=1), some(2, rows=2, seed=2))
    assert torch.equal(keys, before) and torch.equal(layer.keys[:, :, :3], before[1:3])


def test_a_token_is_added_without_copying_those_before_it() -> None:
    layer = RoomyLayer(10, None)
    held = [layer.update(some(tokens), some(tokens)) for tokens in (4, 1, 1, 1)]  # kept: no place is given out again
    assert len({keys.data_ptr() for keys, _ in held}) == len({values.data_ptr() for _, values in held}) == 1


def test_keys_and_values_are_held_in_the_precision_that_is_asked_for() -> None:
    layer = RoomyLayer(4, torch.bfloat16)
    keys, values = layer.update(some(2), some(2, seed=1).to(torch.bfloat16))
    assert keys.dtype == values.dtype == torch.bfloat16
    assert torch.equal(keys, some(2).to(torch.bfloat16))


@pytest.mark.parametrize(("attention", "dtype"), [("sdpa", torch.bfloat16), ("eager", None)])
def test_only_layers_that_keep_every_token_get_room_and_half_precision_only_where_attention_casts(
    attention: str, dtype: torch.dtype | None
) -> None:
    model = tiny_policy().model
    model.set_attn_implementation(attention)
    cache = DynamicCache(config=model.config)
    cache.layers[1] = DynamicSlidingWindowLayer(sliding_window=4)
    room_for(cache, 10, model, torch.bfloat16)
    assert [type(layer) for layer in cache.layers] == [RoomyLayer, DynamicSlidingWindowLayer]
    assert cache.layers[0].as_dtype == dtype

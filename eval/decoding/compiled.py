"""Decoding by a compiled pass over a cache of fixed size. On a GPU a token of a small model is a thousand kernels that
the host starts one by one; compiled, they are fewer, and CUDA starts them all at once (a CUDA graph).

A pass is compiled for its shapes, and its graph reads and writes fixed addresses. So neither changes from step to step:

    rows         the next power of two; those that are missing repeat the last row, and are not looked at
    columns      prompt and longest completion, up to a multiple of COLUMNS, and never fewer than before
    a row that has ended stays, until all have: where kernels take longer to start than to run, it costs nothing
    weights      the half-precision copy that the sampler reads is kept, and the new weights are written into it
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, LogitsProcessorList, StaticCache, TextStreamer
from transformers.cache_utils import StaticLayer

from eval.around import generation_config
from eval.cache import held_dtype
from eval.draw import Draw, cuts
from eval.going import Going
from eval.samples import Sheet
from sft_core.learn.shards import model_to_sample
from sft_core.model.policy import Policy

COLUMNS = 128
# Without `dynamic=False` the second shape that is seen makes a slower pass for all shapes.
COMPILE: dict[str, Any] = {"mode": "reduce-overhead", "dynamic": False}


@dataclass
class Kept:
    """What stays where it is between two calls of the sampler."""

    of: Any = None  # the model whose copy it is
    copy: Any = None
    shape: tuple[Any, ...] = ()  # rows, columns, dtype
    cache: Any = None

    @staticmethod
    def by(policy: Policy) -> Kept:
        return policy.kept.setdefault("compiled", Kept())  # type: ignore[no-any-return]

    def cache_for(self, policy: Policy, rows: int, columns: int) -> Any:
        """An empty cache: the one that is there, if it will do."""
        columns = max(-(-columns // COLUMNS) * COLUMNS, self.shape[1] if self.shape else 0)
        dtype = held_dtype(policy.model, policy.precision.autocast_dtype)
        if self.shape != (rows, columns, dtype):
            self.cache = None  # before there is another one
            self.shape, self.cache = (rows, columns, dtype), fixed_cache(policy.model, columns, dtype)
        self.cache.reset()
        return self.cache


@contextmanager
def model_to_decode(policy: Policy) -> Iterator[Any]:
    """The model as the sampler uses it; where its pass is compiled, the same one each time, with the weights of now."""
    with model_to_sample(policy) as model:
        if policy.decoding != "compiled":
            yield model
            return
        if model is not policy.model:
            model = _kept(policy, model)
    yield model  # and nobody holds the new copy any longer


@torch.no_grad()
def _kept(policy: Policy, fresh: Any) -> Any:
    """The copy that is kept, with the weights of a new one."""
    kept, new = Kept.by(policy), dict(fresh.named_parameters())
    own = dict(kept.copy.named_parameters()) if kept.of is policy.model else {}
    if own.keys() != new.keys():  # the first time, or the model has another adapter since
        forget_pass(fresh)  # it would be the pass of the model that this is a copy of
        kept.of, kept.copy, own = policy.model, fresh, new
    for name, parameter in own.items():
        if parameter is not new[name]:  # what the model and its copies share is new already
            parameter.copy_(new[name])
    return kept.copy


def forget_pass(model: Any) -> None:
    """Its compiled pass, which transformers keeps with it."""
    for module in model.modules():
        vars(module).pop("_compiled_call", None)


def fill_compiled(
    sheet: Sheet,
    model: Any,
    prompts: Sequence[Sequence[int]],
    places: Sequence[int],
    at_once: int,
    streamer: TextStreamer | None,
) -> None:
    """Draw the completions of the prompts at these places, which are no more than `at_once`."""
    policy, sampling = sheet.policy, sheet.sampling
    n, rows = len(places), 1 << (at_once - 1).bit_length()
    going = Going.begin(policy, model, prompts, [*places, *[places[-1]] * (rows - n)], 0)
    width, tokens = going.ids_NW.shape[1], sampling.max_completion_tokens
    cache = Kept.by(policy).cache_for(policy, rows, width + tokens)
    for number, layer in enumerate(going.cache.layers if going.cache is not None else ()):
        if layer.is_initialized:  # prompts of more than one token, which were read once a group
            cache.update(layer.keys, layer.values, number)
    going.cache = None
    place_N1, column_NT = going.place_N[:, None], torch.arange(tokens).expand(rows, -1)
    draw = Draw(sampling.temperature, sheet.numbers(place_N1, column_NT), policy.eos_ids[0], cuts(sampling))
    config = generation_config(policy, tokens)
    config.compile_config = CompileConfig(**COMPILE)
    config.compile_config._compile_all_devices = True  # on a CPU, too
    longer_NW = model.generate(
        input_ids=going.ids_NW,
        attention_mask=going.attention_NW,
        past_key_values=cache,
        generation_config=config,
        logits_processor=LogitsProcessorList([draw] if sampling.temperature else []),
        streamer=streamer,
    )
    drawn_NT = longer_NW[:n, width:].cpu()
    sheet.write(place_N1[:n], column_NT[:n, : drawn_NT.shape[1]], drawn_NT, [logp_N[:n] for logp_N in draw.logp])
    sheet.ended(going.place_N[:n])


class FixedLayer(StaticLayer):  # type: ignore[misc]
    """Keys and values in tensors of fixed size and of a given dtype, whatever autocast made of what comes in."""

    def __init__(self, columns: int, dtype: torch.dtype | None) -> None:
        super().__init__(max_cache_len=columns)
        self.as_dtype = dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        dtype = self.as_dtype or key_states.dtype
        super().lazy_initialization(key_states.to(dtype), value_states.to(dtype))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        dtype = self.as_dtype or self.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)  # type: ignore[no-any-return]


def fixed_cache(model: Any, columns: int, dtype: torch.dtype | None) -> StaticCache:
    """transformers' own, in which layers that keep every token keep it in this dtype."""
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=columns)
    cache.layers = [FixedLayer(columns, dtype) if type(layer) is StaticLayer else layer for layer in cache.layers]
    return cache

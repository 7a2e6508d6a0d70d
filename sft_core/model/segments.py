"""Attention by segments: rows lie one behind the other in a single sequence, and only attention takes them apart.

    ids         q  q  q  a  b  e  c  e  p  p  d  e     a b e and c e answer q q q, d e answers p p
    position    0  1  2  3  4  5  3  4  0  1  2  3     each completion continues after its prompt

All layers but attention see this sequence as it is, each token once and no padding. Attention is computed for rows that
are gathered from it, so that completions never look at one another: q q q a b e, q q q c e and p p d e, each token
looking at all before it; or q q q by itself, and a b e and c e with q q q before them as keys alone, where that is
less work (sft_core.learn.layout decides).

transformers has a public place for attention functions (`AttentionInterface`, `AttentionMaskInterface`). What is put
there hands everything but such sequences on to its own function for `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from sft_core.model.backbone import without_adapter
from sft_core.model.sending import sent
from sft_core.precision import has_ampere_units

# How the learner lays out a micro-batch, the fastest first. "sequence": as drawn above. "groups": a row for each prompt
# with all its completions, which a mask hides from one another. "rows": one for each completion, with padding.
Layout = Literal["sequence", "groups", "rows"]

NAME = "segments"


class Batch(NamedTuple):
    """N rows that share a call, each of at most so many queries and keys."""

    N: int
    Q: int
    K: int
    before_N: Tensor | None  # how many keys are before a row's first query; None: in no row any


@dataclass(frozen=True)
class Segments:
    """A sequence of S tokens, cut into rows."""

    batches: tuple[Batch, ...]
    # Of all batches, one behind the other: the places in the sequence of each row's queries and keys. Rows are padded
    # on the right, with any place, for nothing that counts looks there.
    query_at: Tensor
    key_at: Tensor
    place_S: Tensor  # where each token is among the queries

    @property
    def longest(self) -> int:
        return max(batch.K for batch in self.batches)

    def to(self, device: torch.device) -> Segments:
        batches = (
            batch._replace(before_N=None if batch.before_N is None else sent(batch.before_N, device))
            for batch in self.batches
        )
        at = (sent(self.query_at, device), sent(self.key_at, device), sent(self.place_S, device))
        return Segments(tuple(batches), *at)


class RowsMask(NamedTuple):
    """Travels through the model in the mask's place, to each layer's attention and to its recomputation."""

    segments: Segments
    allowed: tuple[Tensor | None, ...]  # of each batch, bool (N or 1, 1, Q, K); None: everything before


_present: ContextVar[Segments | None] = ContextVar("segments", default=None)


@contextmanager
def attending_by(cut: Segments | None) -> Iterator[None]:
    """The sequence that a model reads within the block consists of these segments."""
    token = _present.set(cut)
    try:
        yield
    finally:
        _present.reset(token)


def _mask(*given: Any, mask_function: Callable[..., Any] = causal_mask_function, **named: Any) -> Any:
    """What a model's layers of one kind (full, sliding) get as their mask."""
    cut = _present.get()
    if cut is None:
        # A mask while tokens are decoded: rows are padded (`generate` has looked); nobody looks again at each token.
        decoding = named.get("q_length") == 1 and named.get("attention_mask") is not None
        named |= {"allow_is_causal_skip": False} if decoding else {}
        return sdpa_mask(*given, **named, mask_function=mask_function)  # type: ignore[misc]
    plain = _repeats_no_keys(named["device"])
    at = torch.arange(cut.longest, device=named["device"])

    def allowed(batch: Batch) -> Tensor | None:
        _, Q, K, before_N = batch
        if before_N is None:
            causal = at[:Q, None] >= at[:K]
            seen = causal if mask_function is causal_mask_function else mask_function(0, 0, at[:Q, None], at[None, :K])
            return None if plain and (seen is causal or torch.equal(seen, causal)) else seen[None, None]
        seen = mask_function(0, 0, (before_N[:, None] + at[:Q])[:, :, None], at[None, None, :K])
        return seen[:, None]  # type: ignore[no-any-return]

    return RowsMask(cut, tuple(map(allowed, cut.batches)))


def _repeats_no_keys(device: torch.device) -> bool:
    """Without a mask transformers leaves it to the kernel that query heads share a key. On CUDA flash attention alone
    can do so (up to torch 2.13), which needs half precision and capability 8.0; a T4 (7.5) would fall back to all pairs
    at once."""
    if torch.device(device).type != "cuda":
        return True
    return torch.is_autocast_enabled("cuda") and has_ampere_units(device)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """query, key, value (1, heads, S, size) -> (1, S, heads, size); without segments, for more rows, too."""
    if not isinstance(attention_mask, RowsMask):
        if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            return _next_token(query, key, value, attention_mask, given.get("scaling"), given.get("dropout", 0.0)), None
        if attention_mask is None and _is_a_prompt(module, query, key, given) and not _repeats_no_keys(query.device):
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            attention_mask = attention_mask[None, None]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]
    cut, allowed = attention_mask
    queries = [batch.N * batch.Q for batch in cut.batches]
    keys = [batch.N * batch.K for batch in cut.batches]
    gathered = ((query, cut.query_at, queries), (key, cut.key_at, keys), (value, cut.key_at, keys))
    pieces = (_at(tensor[0].transpose(0, 1), places).split(sizes) for tensor, places, sizes in gathered)
    found = []
    for batch, mask, *of_batch in zip(cut.batches, allowed, *pieces, strict=True):
        q, k, v = (piece.unflatten(0, (batch.N, -1)).transpose(1, 2) for piece in of_batch)
        found.append(_rows_attend(module, q, k, v, mask, given).flatten(0, 1))
    return _at(torch.cat(found), cut.place_S)[None], None


def _is_a_prompt(module: Any, query: Tensor, key: Tensor, given: dict[str, Any]) -> bool:
    """Whether each token looks at itself and all before it, and heads share keys."""
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return bool(causal) and query.shape[2] == key.shape[2] and query.shape[1] != key.shape[1]


def _at(tokens: Tensor, places: Tensor) -> Tensor:
    """The tokens' (heads, size) at these places. As words of an embedding, whose derivative adds up the gradients of a
    token that several rows read in the rows' order, whatever the number of threads, and quickly."""
    return embedding(places, tokens.flatten(1)).unflatten(-1, tokens.shape[1:])


def _rows_attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, given: dict[str, Any]
) -> Tensor:
    """(N, heads, Q, size) of query, (N, heads, K, size) of key and value -> (N, Q, heads, size)."""
    if mask is not None and query.device.type == "cpu":  # where keys need no copies for the heads that share them
        scale, dropout = given.get("scaling"), given.get("dropout", 0.0)
        grouped = query.shape[1] != key.shape[1]
        out = scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    out, _ = sdpa_attention_forward(module, query, key, value, mask, **{**given, "is_causal": True})
    return out  # type: ignore[no-any-return]


def _next_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    """One query a row and head (N, H, 1, size) -> (N, 1, H, size). Heads that share a key become its queries, where
    transformers would copy all keys for each head."""
    N, H, _, _ = query.shape
    shared = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    out = scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout)
    return out.reshape(N, 1, H, -1)


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, _mask)


def layouts(model: Any) -> tuple[Layout, ...]:
    """Those that a model may be given, the fastest first. That its numbers are right in them is tried later
    (sft_core.learn.trust), but by short texts, which fill no window; that much its config must say."""
    inner = without_adapter(model)
    kinds = kinds_of_layers(inner.config)
    found: list[Layout] = ["rows"]
    if kinds <= {"full"}:
        found.insert(0, "groups")
    replaceable = inner._supports_attention_backend and inner.config._attn_implementation in ("sdpa", NAME)
    if kinds <= {"full", "sliding", "chunked"} and replaceable:
        found.insert(0, "sequence")
    return tuple(found)


def attend_by_segments(model: Any) -> None:
    """Make the model ready for one sequence, if it may be given that; its other inputs it reads as before."""
    if "sequence" in layouts(model):
        without_adapter(model).set_attn_implementation(NAME)


def kinds_of_layers(config: Any) -> set[str]:
    """Attention over the whole text is "full", over a window "sliding" or "chunked". Anything else, recurrent states or
    convolutions, carries what it read on to the next row."""
    names = getattr(config, "layer_types", None) or ["sliding" if getattr(config, "sliding_window", None) else "full"]
    # Not asked by hasattr, which raises where layers differ in their number of heads.
    attends = "num_attention_heads" in {*dir(config), *config.attribute_map}
    return {name.split("_")[0] for name in names} if attends else {"state"}

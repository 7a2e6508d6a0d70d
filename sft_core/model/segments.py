"""Attention by segments: rows lie one behind the other in a single sequence, and only attention takes them apart.

    ids         q  q  q  a  b  e  c  e  p  p  d  e     a b e and c e answer q q q, d e answers p p
    position    0  1  2  3  4  5  3  4  0  1  2  3     each completion continues after its prompt

All layers but attention see this sequence as it is, each token once and no padding. Attention is computed for the rows
q q q a b e, q q q c e and p p d e: causal, so no mask is needed, and completions never look at one another. Each row
computes its prompt's attention again. Where that would cost more (long prompts, short completions), attention takes the
group in one piece, q q q a b e c e, under a mask.

transformers has a public place for attention functions (`AttentionInterface`, `AttentionMaskInterface`). What is put
there hands everything but such sequences on to its own function for `scaled_dot_product_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from sft_core.model.backbone import without_adapter

# How the learner lays out a micro-batch, the fastest first. "sequence": as drawn above. "groups": a row for each prompt
# with all its completions, which a mask hides from one another. "rows": one for each completion, with padding.
Layout = Literal["sequence", "groups", "rows"]

NAME = "segments"
# Rows of unlike lengths share a call, the shorter ones padded, as long as a row wastes fewer (query, key) pairs than
# this: their attention takes about as long as a call of its own.
WASTE = 128**2


class Row(NamedTuple):
    """A row by its pieces of the sequence: a completion's prompt and its own tokens, or all of it in one piece."""

    prompt: int
    completion: int | None = None


@dataclass(frozen=True)
class Segments:
    """A sequence cut into pieces of these `lengths`, and the rows that they form, in batches, the longest row first; or
    whole groups, each by its prompt's piece and the piece after its last completion's."""

    lengths: tuple[int, ...]
    batches: tuple[tuple[Row, ...], ...]
    groups: tuple[tuple[int, int], ...] = ()

    @property
    def longest(self) -> int:
        rows = [length(batch[0], self.lengths) for batch in self.batches]
        return max(rows + [self.lengths[at] + max(self.lengths[at + 1 : end]) for at, end in self.groups])


def length(row: Row, lengths: Sequence[int]) -> int:
    """Of a row, in tokens."""
    return lengths[row.prompt] + (0 if row.completion is None else lengths[row.completion])


def segments(lengths: Sequence[int], rows: Sequence[Row]) -> Segments:
    """Batches for attention. A prompt's completions are the pieces behind its own.

    >>> segments([3, 200, 2, 1], [Row(0, 1), Row(0, 2), Row(0, 3)]).batches
    ((Row(prompt=0, completion=1),), (Row(prompt=0, completion=2), Row(prompt=0, completion=3)))
    """
    of_prompt: dict[int, list[Row]] = {}
    for row in rows:
        of_prompt.setdefault(row.prompt, []).append(row)
    groups: list[tuple[int, int]] = []
    for prompt, its_rows in of_prompt.items():
        end = prompt + len(its_rows) + 1
        # Under a mask all pairs of the group are computed, else half of each row's.
        if its_rows[0].completion is not None and sum(lengths[prompt:end]) ** 2 < _pairs(its_rows, lengths):
            groups.append((prompt, end))
    apart = [row for row in rows if row.prompt not in dict(groups)]
    batches: list[list[Row]] = []
    for row in sorted(apart, key=lambda row: -length(row, lengths)):
        if batches and length(batches[-1][0], lengths) ** 2 - length(row, lengths) ** 2 < WASTE:
            batches[-1].append(row)
        else:
            batches.append([row])
    return Segments(tuple(lengths), tuple(map(tuple, batches)), tuple(groups))


def _pairs(rows: Sequence[Row], lengths: Sequence[int]) -> float:
    return sum(length(row, lengths) ** 2 for row in rows) / 2


class RowsMask(NamedTuple):
    """Travels through the model in the mask's place, to each layer's attention and to its recomputation."""

    segments: Segments
    allowed: Tensor | None  # (longest, longest) bool, of any row; None: everything before
    of_groups: tuple[Tensor, ...] = ()  # (1, 1, tokens, tokens) bool


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
        return sdpa_mask(*given, **named, mask_function=mask_function)  # type: ignore[misc]
    plain = _repeats_no_keys(named["device"])
    if plain and mask_function is causal_mask_function and not cut.groups:
        return RowsMask(cut, None)
    at = torch.arange(cut.longest, device=named["device"])
    causal = at[:, None] >= at[None, :]
    allowed = causal if mask_function is causal_mask_function else mask_function(0, 0, at[:, None], at[None, :])
    of_groups = tuple(_of_group(allowed, cut.lengths[at:end]) for at, end in cut.groups)
    return RowsMask(cut, None if plain and torch.equal(allowed, causal) else allowed, of_groups)


def _of_group(allowed: Tensor, lengths: Sequence[int]) -> Tensor:
    """What each token of a prompt and its completions sees: of the prompt and its own completion what a row would."""
    device, P = allowed.device, lengths[0]
    positions = [torch.arange(P, device=device)] + [torch.arange(P, P + T, device=device) for T in lengths[1:]]
    position = torch.cat(positions)
    part = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(device)
    seen = (part[None, :] == 0) | (part[None, :] == part[:, None])
    return (allowed[position[:, None], position[None, :]] & seen)[None, None]


def _repeats_no_keys(device: torch.device) -> bool:
    """Without a mask transformers leaves it to the kernel that query heads share a key. On CUDA flash attention alone
    can do so, which needs half precision and capability 8.0; a T4 (7.5) would fall back to all pairs at once."""
    if torch.device(device).type != "cuda":
        return True
    return torch.is_autocast_enabled("cuda") and torch.cuda.get_device_capability(device) >= (8, 0)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **given: Any
) -> tuple[Tensor, None]:
    """query, key, value (1, heads, tokens, size) -> (1, tokens, heads, size); without segments, for more rows, too."""
    if not isinstance(attention_mask, RowsMask):
        if query.shape[2] == 1 and (attention_mask is None or attention_mask.shape[1] == 1):
            return _next_token(query, key, value, attention_mask, given.get("scaling"), given.get("dropout", 0.0)), None
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]
    cut, allowed, of_groups = attention_mask
    # split and cat, whose derivatives are one cat and one split; each slice's own would be a tensor of zeros.
    pieces = [tensor[0].transpose(0, 1).split(cut.lengths) for tensor in (query, key, value)]
    attended: dict[int, Tensor] = {}
    for batch in cut.batches:
        width = length(batch[0], cut.lengths)
        q, k, v = (_rows(each, batch, width).transpose(1, 2) for each in pieces)
        mask = None if allowed is None else allowed[:width, :width]
        out, _ = sdpa_attention_forward(module, q, k, v, mask, **{**given, "is_causal": True})
        for row, out_LHD in zip(batch, out, strict=True):
            P, tokens = cut.lengths[row.prompt], length(row, cut.lengths)
            of_prompt, of_completion, _ = out_LHD.split([P, tokens - P, width - tokens])
            attended.setdefault(row.prompt, of_prompt)  # the same in all rows of a prompt
            if row.completion is not None:
                attended[row.completion] = of_completion
    for (prompt, end), mask in zip(cut.groups, of_groups, strict=True):
        q, k, v = (torch.cat(each[prompt:end])[None].transpose(1, 2) for each in pieces)
        out, _ = sdpa_attention_forward(module, q, k, v, mask, **given)
        attended |= dict(enumerate(out[0].split(cut.lengths[prompt:end]), prompt))
    return torch.cat([attended[number] for number in range(len(cut.lengths))])[None], None


def _next_token(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    """One query a row and head (N, H, 1, size) -> (N, 1, H, size). Heads that share a key become its queries, where
    transformers would copy all keys for each head."""
    N, H, _, _ = query.shape
    shared = query.unflatten(1, (key.shape[1], -1)).squeeze(3)
    out = scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout)
    return out.reshape(N, 1, H, -1)


def _rows(pieces: Sequence[Tensor], batch: Sequence[Row], width: int) -> Tensor:
    """(rows, width, heads, size): the batch's rows, padded on the right, where nothing is seen by what comes before."""
    parts = []
    for row in batch:
        of_row = [pieces[row.prompt]] + ([] if row.completion is None else [pieces[row.completion]])
        missing = width - sum(map(len, of_row))
        parts += of_row if not missing else [*of_row[:-1], pad(of_row[-1], (0, 0, 0, 0, 0, missing))]
    return torch.cat(parts).unflatten(0, (len(batch), width))


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

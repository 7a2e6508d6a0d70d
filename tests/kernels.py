"""Which of PyTorch's attention kernels on CUDA each of this project's calls gets: the conditions of PyTorch's sources,
for the tables in docs/t4-memory.md and the test marked gpu that asks a GPU."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Kernel = Literal["flash", "memory-efficient", "math"]
Call = Literal[
    "a prompt with its completion, in the learner",
    "completions after keys of a prompt, in the learner",
    "prompts of one length, in the sampler",
    "padded prompts, in the sampler",
    "the next token",
    "the next token, after padded prompts",
]
CALLS: tuple[Call, ...] = get_args(Call)


def asked_for(call: Call, capability: tuple[int, int], dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether the call comes with a mask, and whether query heads share keys (sft_core/model/segments.py)."""
    if call.startswith("the next token"):
        return "padded" in call, False
    plain = capability >= (8, 0) and dtype != torch.float32 and "padded" not in call and "after keys" not in call
    return not plain, plain


def kernel(capability: tuple[int, int], dtype: torch.dtype, size: int, masked: bool, grouped: bool) -> Kernel:
    """aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, up to PyTorch 2.13, for heads of this `size`."""
    half, ampere = dtype != torch.float32, capability >= (8, 0)
    known = ampere or dtype != torch.bfloat16
    if half and ampere and not masked and size <= 256:
        return "flash"
    multiple = 8 if half else 4 if ampere else 1
    return "memory-efficient" if known and not grouped and size % multiple == 0 else "math"


def tensors(size: int, dtype: torch.dtype, masked: bool, grouped: bool, tokens: int) -> tuple[Tensor, ...]:
    """On the GPU: 2 rows of queries, keys and values of 4 heads, and a mask or nothing."""
    heads = 2 if grouped else 4
    query, key, value = (
        torch.zeros(2, n, t, size, dtype=dtype, device="cuda") for n, t in ((4, tokens), (heads, 24), (heads, 24))
    )
    mask = torch.ones(2, 1, tokens, 24, dtype=torch.bool, device="cuda") if masked else None
    return query, key, value, *([mask] if mask is not None else [])

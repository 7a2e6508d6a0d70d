"""grpo_core.train under fp16 autocast and its GradScaler, on a CPU, at a bearable speed.

    python -m benchmarks.fp16_on_cpu [--seed 1 and any other flag of grpo_core.train]

A CPU without fp16 instructions is hundreds of times slower in fp16 than in float32. What matters of fp16 are its
roundings and its range, and those are kept here: the inputs, results and gradients of each matrix product and attention
are cast to fp16, while the sums in between run in float32, as they do in a GPU's tensor cores.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from grpo_core import train

PRODUCTS = (functional.linear, functional.scaled_dot_product_attention)


class FP16Products(TorchFunctionMode):  # type: ignore[misc]
    """Within it, what CPU autocast would compute in fp16 is computed in float32 between fp16's roundings."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in PRODUCTS or not torch.is_autocast_enabled("cpu"):
            return func(*args, **(kwargs or {}))
        with torch.autocast("cpu", enabled=False):
            given = {name: _rounded(value) for name, value in (kwargs or {}).items()}
            return func(*map(_rounded, args), **given).half()


def _rounded(value: Any) -> Any:
    """The nearest fp16 values as float32; their gradient passes through fp16, too."""
    return value.half().float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def main(argv: Sequence[str] | None = None) -> None:
    # logit_chunk 0: what a backward pass computes again would be computed outside of the mode.
    forced = ["--device=cpu", "--precision=fp16", "--logit_chunk=0", "--gradient_checkpointing=False"]
    with FP16Products():
        train.main([*(sys.argv[1:] if argv is None else argv), *forced])


if __name__ == "__main__":
    main()

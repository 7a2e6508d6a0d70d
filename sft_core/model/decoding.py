"""Which way to decode is taken, by what the device and the model can do. (That its draws are right is tried later, in
eval/trust.py.)"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import Any, Literal

import torch

from sft_core.model.backbone import without_adapter

# "segments": ended rows leave between two calls of `generate` (eval/sampling.py). The others: eval/decoding.
Decoding = Literal["segments", "compiled", "paged"]

TRITON_NEEDS = (7, 0)  # CUDA capability: torch/_inductor refuses GPUs before Volta


def decoding_for(asked: str, model: Any, device: torch.device) -> Decoding:
    """The way that --decoding asks for, `auto` included. Pages have yet to show on a GPU that they are faster."""
    if asked == "auto":
        return "compiled" if can_compile(model, device) else "segments"
    return asked  # type: ignore[return-value]


def can_compile(model: Any, device: torch.device) -> bool:
    """Whether kernels can be made for this device, and a pass of this model is said to be one graph."""
    inner = without_adapter(model)
    plain = getattr(inner, "hf_quantizer", None) is None and inner._can_compile_fullgraph
    return bool(plain and device.type == "cuda" and makes_kernels(device))


def makes_kernels(device: torch.device) -> bool:
    """Triton is there, the GPU is not too old for it, and it finds the C compiler that its launchers need."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    capable = torch.cuda.get_device_capability(device) >= TRITON_NEEDS
    return capable and find_spec("triton") is not None and compiler is not None

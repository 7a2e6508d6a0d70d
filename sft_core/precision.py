"""Which arithmetic a run uses. Master weights and optimizer state are float32 in every case.

Autocast runs the matrix products in half precision; log-softmax, ratios, KL and sums stay in float32. fp16 has a
largest value of 65,504 and a smallest normal one of 6e-5, so its gradients need a GradScaler: the loss is multiplied
by a large factor before the backward pass, gradients are divided by it before clipping, and a step whose gradients
overflowed is repeated with half the factor. bf16 has float32's range and needs none.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Precision:
    """`autocast_dtype` None means plain float32."""

    device: torch.device
    autocast_dtype: torch.dtype | None

    @property
    def name(self) -> str:
        return str(self.autocast_dtype or torch.float32).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[None]:
        # Each matrix is used once in a pass: casts kept until its end would only take memory.
        return torch.autocast(
            self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None, cache_enabled=False
        )

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss under fp16; a no-op under bf16 and float32."""
        return torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)


def pick_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one, else the CPU.

    Raises:
        ValueError: `name` is not a device that PyTorch has here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"--device {name}: not available here ({str(error).splitlines()[0]}); try auto or cpu"
        ) from error
    return device


def pick_precision(name: str, device: torch.device) -> Precision:
    """Resolve `auto`, `float32`, `bf16` or `fp16` for a device (design contract 7)."""
    if name == "auto":
        name = _best(device)
    dtype = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return Precision(device, dtype)


def _best(device: torch.device) -> str:
    if device.type == "cuda":
        return "bf16" if has_ampere_units(device) else "fp16"
    if device.type == "cpu" and cpu_capabilities().get("avx512_bf16", False):
        return "bf16"
    return "float32"


def has_ampere_units(device: torch.device) -> bool:
    """Whether this CUDA GPU multiplies bf16 matrices itself and runs flash attention: both came with compute capability
    8.0. What lacks them (a T4 has 7.5) computes bf16 by emulation, and attends with a mask or by its memory-efficient
    kernel alone (docs/t4-memory.md).

    The capability, not torch.cuda.is_bf16_supported(): that says yes on a T4, for it tries to make a bf16 tensor. With
    including_emulation=False it asks for the same capability as here, but of the current device only.
    """
    return torch.cuda.get_device_capability(device) >= (8, 0)


def cpu_capabilities() -> dict[str, Any]:
    """What PyTorch reports about this CPU; empty in releases that report nothing."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())

"""What a machine can do at most: GPUs by name from their vendor's data sheets, the machine at hand by measurement."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from sft_core.learn.fit import available
from sft_core.precision import pick_device, pick_precision

GIB = 2**30
# GB/s in each direction over 16 lanes, 128 of 130 bits; NVLink's rate is in the GPU's data sheet, for both directions.
PCIE_3, PCIE_4, PCIE_5 = 15.75, 31.5, 63.0


@dataclass(frozen=True)
class Ceilings:
    """What no step can exceed: floating-point operations a second (a multiply-add is two) and bytes of memory read or
    written a second."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Machine:
    """A device that a run may be planned for. `memory` in bytes; `rates`: dense matrix products, flop/s by dtype;
    `bandwidth`: bytes/s. Without `rates` it is the machine at hand, to be measured."""

    name: str
    kind: str  # torch's name for it: cpu, cuda
    memory: float
    best: torch.dtype  # what --precision auto picks there
    rates: dict[torch.dtype, float]
    bandwidth: float
    link: float = 0.0  # bytes/s in each direction to another device of the same machine; 0: unknown

    def dtype(self, precision: str) -> torch.dtype:
        """Of the matrix products under this --precision."""
        return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, self.best)

    def ceilings(self, dtype: torch.dtype) -> Ceilings:
        return Ceilings(self.rates[dtype], self.bandwidth) if self.rates else measured(torch.device(self.kind), dtype)


def _gpu(
    name: str, gib: float, half: float, single: float, bandwidth: float, bf16: bool = True, link: float = PCIE_4
) -> Machine:
    """Memory in GiB, rates in Tflop/s, bandwidth and link in GB/s. A bf16 that is only emulated is no faster than
    float32."""
    rates = {torch.float16: half, torch.bfloat16: half if bf16 else single, torch.float32: single}
    best = torch.bfloat16 if bf16 else torch.float16
    rates = {dtype: rate * 1e12 for dtype, rate in rates.items()}
    return Machine(name, "cuda", gib * GIB, best, rates, bandwidth * 1e9, link * 1e9)


# Rates and bandwidth from NVIDIA's data sheets, dense (sheets that count sparsity say twice as much); float32 without
# TF32, which PyTorch leaves off. Memory is less than a sheet's: what PyTorch gives as "total capacity" when it runs out
# on such a device, after error correction and the driver's share (T4s are seen with 14.56 to 14.75 GiB).
GPUS = {
    # "NVIDIA T4" (2019): 65 Tflop/s fp16, 8.1 fp32, 320 GB/s, 16 GB; no bf16.
    "t4": _gpu("T4", 14.56, 65, 8.1, 320, bf16=False, link=PCIE_3),
    # "NVIDIA L4" (2023): 242 Tflop/s fp16 and bf16 with sparsity, 30.3 fp32, 300 GB/s, 24 GB.
    "l4": _gpu("L4", 22.05, 121, 30.3, 300),
    # "NVIDIA A10G" (Amazon's g5): 70 Tflop/s fp16 and bf16, 35 fp32, 600 GB/s, 24 GB. (The A10 has 125 and 31.)
    "a10g": _gpu("A10G", 22.05, 70, 35, 600),
    # "NVIDIA A100 Tensor Core GPU": 312 Tflop/s fp16 and bf16, 19.5 fp32; 40 GB at 1,555 GB/s, 80 GB (SXM) at 2,039;
    # NVLink 600 GB/s.
    "a100": _gpu("A100 40 GB", 39.39, 312, 19.5, 1555, link=300),
    "a100-80": _gpu("A100 80 GB", 79.15, 312, 19.5, 2039, link=300),
    # GeForce cards, whose products in half precision run at half rate when they are summed in float32, as PyTorch does.
    # "NVIDIA Turing GPU Architecture" (2018), RTX 2080 Ti Founders Edition: 56.9 fp16, 14.2 fp32; no bf16.
    "2080ti": _gpu("RTX 2080 Ti", 10.75, 56.9, 14.2, 616, bf16=False, link=PCIE_3),
    # "NVIDIA Ampere GA102 GPU Architecture" (2020): 71 Tflop/s fp16 and bf16 (dense), 35.6 fp32, 936 GB/s, 24 GB.
    "3090": _gpu("RTX 3090", 23.6, 71, 35.6, 936),
    # RTX 3060, 12 GB: 3,584 cores at 1.78 GHz, at the same rates for each core and clock; 360 GB/s.
    "3060": _gpu("RTX 3060", 11.75, 25.5, 12.7, 360),
    # "NVIDIA Ada GPU Architecture" (2022): 165.2 Tflop/s fp16 and bf16 (dense), 82.6 fp32, 1,008 GB/s, 24 GB.
    "4090": _gpu("RTX 4090", 23.6, 165.2, 82.6, 1008),
    # RTX 4060 Ti, 16 GB: 4,352 cores at 2.54 GHz, at the same rates for each core and clock; 288 GB/s;
    # 8 lanes.
    "4060ti": _gpu("RTX 4060 Ti 16 GB", 15.6, 44.1, 22.1, 288, link=PCIE_4 / 2),
    # "NVIDIA RTX Blackwell GPU Architecture" (2025): 209.5 Tflop/s fp16, bf16 (dense), 104.8 fp32, 1,792 GB/s, 32 GB.
    "5090": _gpu("RTX 5090", 31.4, 209.5, 104.8, 1792, link=PCIE_5),
    # "NVIDIA H100 Tensor Core GPU" (SXM5): 1,979 Tflop/s fp16 and bf16 with sparsity, 67 fp32, 3.35 TB/s, 80 GB;
    # NVLink 900 GB/s.
    "h100": _gpu("H100", 79.1, 989, 67, 3350, link=450),
}


def machine(name: str, device_name: str = "auto") -> Machine:
    """A GPU by name, or `this` machine: its GPU where it has one, else its CPU, unless `device_name` says which.

    Raises:
        ValueError: no such name.
    """
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    if name != "this":
        raise ValueError(f"--gpu {name}: expected one of {', '.join(GPUS)}, or this (measured here)")
    device = pick_device(device_name)
    best = pick_precision("auto", device).autocast_dtype or torch.float32
    return Machine(f"this machine's {device.type.upper()}", device.type, _capacity(device), best, {}, 0.0)


@cache
def measured(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The machine at hand, with as many threads as PyTorch uses now. About two seconds; the best of several tries,
    since whatever else runs here can only slow them down."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    flops = 2 * size**3 / _best_seconds(lambda: left @ right, device)

    # Far more than any cache holds. Copying reads and writes each byte; a sum only reads.
    source = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)  # float32: 1 GB or 256 MB
    target, size_bytes = torch.empty_like(source), source.numel() * source.element_size()
    copied = 2 * size_bytes / _best_seconds(lambda: target.copy_(source), device)
    read = size_bytes / _best_seconds(lambda: source.sum(), device)
    return Ceilings(flops, max(copied, read))


def _best_seconds(work: Callable[[], Tensor], device: torch.device, budget: float = 0.6) -> float:
    """The shortest of the calls that fit into `budget` seconds, at least three, after one that is not counted."""
    work()
    best, began = float("inf"), time.perf_counter()
    calls = 0
    while calls < 3 or time.perf_counter() - began < budget:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        best, calls = min(best, time.perf_counter() - start), calls + 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _capacity(device: torch.device) -> float:
    """Bytes of memory that the device has; of a CPU, what the system says is to be had now (Linux)."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    left = available()
    return float("inf") if left is None else left

"""Peak memory: of the process on a CPU (Linux's high-water mark of the resident set), of the allocator on CUDA."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Begin a new measurement. On a CPU other than Linux's this does nothing: the peak stays the process's own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR.exists():
        CLEAR.write_text("5")  # proc(5): resets the high-water mark to the present size


def peak_bytes(device: torch.device) -> int:
    """Bytes held at once at most, since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():
        (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def outside_bytes(device: torch.device) -> int:
    """Of a GPU's memory in use, what torch's allocator does not hold: the context and kernels of this process, if no
    other has the GPU. 0 on a CPU, where the peak is the whole process's."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)

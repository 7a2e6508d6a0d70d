"""What makes two runs differ: the random generators of a process, under torchrun of all ranks; on CUDA also the order
in which kernels add."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy
import torch

from sft_core.learn import ranks


def deterministic(on: bool) -> None:
    """Under --deterministic: of each operation the kernel that gives the same bits every time, or an error where there
    is none (`torch.use_deterministic_algorithms`). Call before the first matrix product. On a CPU it changes no bit:
    there kernels add in one order anyway."""
    torch.use_deterministic_algorithms(on)
    if on:
        # cuBLAS reads it when it is first used: a workspace for each stream, none of which is another's.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False  # which would time kernels, and take another one each time
        # Memory need not be filled before it is written: nothing reads what was not (tests/test_deterministic.py).
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def random_state() -> dict[str, Any]:
    """The state of every random generator of the process: PyTorch's on each device, Python's, NumPy's. Under torchrun
    no GPU's, of which each rank has another, and from which neither prompts nor completions are drawn."""
    gpus = torch.cuda.device_count() if ranks.world() == 1 else 0
    version, words, gauss = random.getstate()
    name, keys, *place = numpy.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": {str(i): torch.cuda.get_rng_state(i) for i in range(gpus)},
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
        "python": [version, list(words), gauss],
        "numpy": [name, [int(key) for key in keys], *place],
    }


def same_random_state() -> None:
    """Under torchrun: every rank's generators go on as rank 0's do."""
    if ranks.world() > 1:
        set_random_state(ranks.by_first(random_state, "random state"))


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned; devices that are not present are left out."""
    torch.set_rng_state(state["torch"])
    for device, of_device in state["cuda"].items():
        if int(device) < torch.cuda.device_count():
            torch.cuda.set_rng_state(of_device, int(device))
    if state["mps"] is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *place = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *place))

"""Tests on the simulated device (tests/simulated_device.py), in a process of their own that serves all of them."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from sft_core.model.policy import Policy
from sft_core.precision import Precision

# For `pytestmark`: a device in Python needs the device guard in Python.
NEEDS_THE_HOOKS = pytest.mark.skipif(
    not hasattr(torch._C, "_acc"), reason=f"torch {torch.__version__} has no device guard for devices in Python"
)


def on_the_device(test: Callable[..., None]) -> Callable[..., None]:
    """Run this test where the simulated device is; its arguments and what it raises travel."""

    @functools.wraps(test)
    def elsewhere(*args: Any, **kwargs: Any) -> None:
        _process().submit(_inside, test.__module__, test.__name__, args, kwargs).result()

    elsewhere.inside = test  # type: ignore[attr-defined]
    return elsewhere


def moved(policy: Policy, half: torch.dtype | None = None) -> Policy:
    """The policy on the device, with this dtype for autocast."""
    device = torch.device("simulated")
    policy.model.to(device)
    return replace(policy, precision=Precision(device, half))


@functools.lru_cache(maxsize=1)
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), register)


def _inside(module: str, name: str, args: Any, kwargs: Any) -> None:
    from tests.simulated_device import DEVICE

    test = getattr(importlib.import_module(module), name).inside
    with warnings.catch_warnings(), DEVICE.entered():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft is behind
        test(*args, **kwargs)


# Under autocast on CUDA (torch/aten/src/ATen/autocast_mode.h), of what this project and its models use.
IN_HALF = ["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "scaled_dot_product_attention"]
IN_FLOAT32 = ["exp", "log", "pow.Tensor_Scalar", "rsqrt", "softmax.int", "log_softmax.int", "cumsum", "sum"]
IN_FLOAT32 += ["sum.dim_IntList", "layer_norm", "nll_loss", "cross_entropy_loss", "norm.Scalar", "reciprocal"]


def register() -> None:
    """Make the device known to PyTorch, once in a process."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from tests.simulated_device import DEVICE, NAME

    class Module:
        """`torch.simulated`."""

        def is_initialized(self) -> bool:
            return True

        is_available = is_initialized

        def _is_in_bad_fork(self) -> bool:
            return False

        def device_count(self) -> int:
            return 1

        def current_device(self) -> int:
            return 0

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.float16, torch.bfloat16]

        def manual_seed_all(self, seed: int) -> None:
            DEVICE.random_state = torch.Generator().manual_seed(seed).get_state()

        def get_rng_state(self, device: Any = 0) -> torch.Tensor:
            return DEVICE.random_state.clone()

        def set_rng_state(self, state: torch.Tensor, device: Any = 0) -> None:
            DEVICE.random_state = state.clone()

    _setup_privateuseone_for_python_backend(NAME, Module())
    # Modules change their parameters' contents when they move, as on CUDA, so that tied ones stay tied.
    torch.__future__.set_swap_module_params_on_conversion(True)
    _register_autocast(NAME)


KEPT: list[Any] = []  # libraries, which undo what they did when they go


def _register_autocast(name: str) -> None:
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    casts = torch.library.Library("aten", "IMPL")
    KEPT.extend([rest, casts])

    def kernel(op: Any, half: bool) -> Callable[..., Any]:
        def cast(leaf: Any) -> Any:
            eligible = isinstance(leaf, torch.Tensor) and leaf.device.type == name and leaf.is_floating_point()
            if not eligible or leaf.dtype == torch.float64:
                return leaf
            return leaf.to(torch.get_autocast_dtype(name) if half else torch.float32)

        def casting(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = torch.utils._pytree.tree_map(cast, (args, kwargs))
            with torch.autocast(name, enabled=False):
                return op(*args, **kwargs)

        return casting

    for half, names in ((True, IN_HALF), (False, IN_FLOAT32)):
        for each in names:
            packet, _, overload = each.partition(".")
            op = getattr(getattr(torch.ops.aten, packet), overload or "default")
            casts.impl(each, kernel(op, half), "AutocastPrivateUse1")

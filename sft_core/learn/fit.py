"""`--micro_batch auto`: the largest micro-batch whose forecast fits into memory, and where even a small one does not,
checkpointing, and on a GPU AdamW's moments in main memory. What is chosen changes speed and memory only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from sft_core.config import OptimConfig, size_of
from sft_core.learn import ranks
from sft_core.learn.footprint import GB, Plan
from sft_core.learn.recovery import size_text
from sft_core.learn.rows import LARGEST, Tokens
from sft_core.model.shapes import Shapes, shapes_of
from sft_core.model.source import Source
from sft_core.precision import pick_device, pick_precision

Config = TypeVar("Config", bound=Any)

SMALLEST = 2**8  # tokens of a micro-batch
# Each pass reads all weights and writes all gradients: with fewer tokens, recomputing activations costs less.
WORTH_IT = 2**10
# The part of memory that a forecast may fill: forecasts are up to a fifth too low, and a GPU's allocator loses some.
SHARE = 0.8


@dataclass(frozen=True)
class Fit(Generic[Config]):
    """What a run is to do, why in one line, and the forecast; None for a model whose shape is not understood here."""

    config: Config
    micro_batch: int | Tokens
    line: str
    plan: Plan | None


# Of a configuration's step with such micro-batches: shapes, whether under autocast, and the device's type follow.
# So does how many ranks there are.
PlanOf = Callable[[Config, Shapes, bool, str, int | Tokens, int], Plan]


def fitted(config: Config, source: Source | None, plan_of: PlanOf[Config]) -> Fit[Config]:
    """What the run will do on this machine. For a model that cannot be forecast, the largest micro-batch, which is
    halved where it is too large."""
    device = pick_device(config.device)
    limit = min(ranks.gathered(memory_for(config, device), "memory"))
    try:
        half = pick_precision(config.precision, device).autocast_dtype is not None
        shapes = shapes_of(config, source)
        return fit(
            config,
            device.type,
            limit,
            lambda *given: plan_of(given[0], shapes, half, device.type, given[1], ranks.count()),
            ranks.count(),
        )
    except Exception as error:  # whatever a model of another kind lacks
        line = f"memory: no forecast for this model ({type(error).__name__}: {str(error)[:100]})"
        return Fit(config, config.micro_batch or LARGEST, line, None)


def fit(
    config: Config, kind: str, limit: float, plan_of: Callable[[Config, int | Tokens], Plan], count: int = 1
) -> Fit[Config]:
    """What is asked for; under --micro_batch auto the first choice, of those that are fast the first, whose forecast
    fills no more than SHARE of `limit` bytes; where none does, the first that needs the least. Under --decoding auto
    without what a compiled pass keeps on a GPU, where there is no room for it. `kind`: cpu or cuda; `count`: of ranks.
    """
    found = _fit(config, kind, limit, plan_of, count)
    fits = found.config == config and found.plan is not None and found.plan.peak <= SHARE * limit
    if fits or kind != "cuda" or config.decoding != "auto":
        return found
    without = _fit(replace(config, decoding="segments"), kind, limit, plan_of, count)
    if without.plan == found.plan:  # of a program that does not sample
        return found
    return replace(without, line=f"{without.line}, --decoding segments")


def _fit(
    config: Config, kind: str, limit: float, plan_of: Callable[[Config, int | Tokens], Plan], count: int
) -> Fit[Config]:
    each = f", on each of {count} ranks" if count > 1 else ""
    parallel = (
        [{"parallel": "fsdp"}]
        if count > 1 and config.parallel == "auto" and not (config.offload_optimizer or config.use_4bit)
        else []
    )
    if config.micro_batch and not parallel:
        plan = plan_of(config, config.micro_batch)
        return Fit(config, config.micro_batch, f"{plan.line()}{each}", plan)
    choices = list(_choices(config, kind, parallel))
    plans = [plan_of(*choice) for choice in choices]
    least = min(plan.peak for plan in plans)
    first = next(i for i, plan in enumerate(plans) if plan.peak <= max(SHARE * limit, least))
    (changed, size), plan = choices[first], plans[first]
    added = "".join(f", --{name} {value}" for name, value in _changes(config, changed))
    enough = "" if plan.peak <= SHARE * limit else ", which may not be enough"
    told = f"{plan.line()}{each}; with {limit / GB:.1f} GB{enough}: micro-batches of {size_text(size)}{added}"
    return Fit(changed, size, told, plan)


def _choices(config: Config, kind: str, parallel: Sequence[dict[str, Any]]) -> Iterator[tuple[Config, int | Tokens]]:
    """From fast to slow. `parallel`: what else could be changed where there are several ranks."""
    if config.micro_batch:
        yield from ((replace(config, **changes), config.micro_batch) for changes in ({}, *parallel))
        return
    ways: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    moments = kind == "cuda" and not config.offload_optimizer and config.parallel != "fsdp"
    elsewhere = [{**changes, "offload_optimizer": "cpu"} for changes in ways if moments]
    ways += [{**changes, **more} for more in parallel for changes in ways] + elsewhere
    for changes in ways:
        for k in range(LARGEST.count.bit_length() - 1, SMALLEST.bit_length() - 2, -1):
            if 2**k >= WORTH_IT or changes is ways[-1]:
                yield replace(config, **changes), Tokens(2**k)


def _changes(before: Config, after: Config) -> list[tuple[str, Any]]:
    """Fields with another value."""
    pairs = ((field.name, getattr(before, field.name), getattr(after, field.name)) for field in fields(before))
    return [(name, now) for name, then, now in pairs if now != then]


def memory_for(config: OptimConfig, device: torch.device) -> float:
    """Bytes that the run may take: --memory, or what this process has and could get beside other ranks."""
    if config.memory:
        return float(size_of(config.memory))
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device))
    left = available()
    return _own() + min(_half_of_all() if left is None else left, _left_to_group()) / ranks.beside()


def _own() -> float:
    """Bytes that this process holds."""
    with suppress(OSError, ValueError, IndexError):
        return float(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    return 0.0


def available() -> float | None:
    """Bytes that the machine has left, as Linux counts them; None elsewhere."""
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return None


def _half_of_all() -> float:
    """Bytes: what may be left where nobody counts."""
    with suppress(OSError, ValueError, AttributeError):
        return 0.5 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def _left_to_group() -> float:
    """Bytes that the container has left, where it has a limit."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        most, now = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if most != "max":
            reclaimable = [line for line in (group / "memory.stat").read_text().splitlines() if "inactive_file" in line]
            return float(int(most) - int(now) + sum(int(line.split()[1]) for line in reclaimable[:1]))
    return float("inf")

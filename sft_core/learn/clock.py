"""Where the time of a step goes, and how far a run has come."""

from __future__ import annotations

import sys
import time

import torch
from tqdm import tqdm

from sft_core.learn import ranks


def bar_seconds() -> float:
    """Seconds between two drawings of a progress bar; long in a file, where each drawing is a new line."""
    return 0.1 if sys.stderr.isatty() else 10.0


def step_bar(name: str, done: int, steps: int, shown: bool) -> tqdm[int]:
    """The steps from `done` + 1 to `steps`, under a progress bar if it is to be shown."""
    return tqdm(
        range(done + 1, steps + 1),
        name,
        steps,
        initial=done,
        disable=not (shown and ranks.first()),
        unit="step",
        mininterval=bar_seconds(),
    )


class Stopwatch:
    """Where the time of a step goes. `lap(name)` adds the time since the last lap to `name`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.start = self.last = now(device)
        self.before, self.waited = ranks.waited(), 0.0  # seconds of waiting for other ranks, and of exchange

    def lap(self, name: str) -> None:
        at = now(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + at - self.last
        self.last, self.waited = at, ranks.waited() - self.before

    @property
    def total(self) -> float:
        return self.last - self.start


def now(device: torch.device) -> float:
    """Seconds on a clock, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # kernels run behind Python's back
    return time.perf_counter()

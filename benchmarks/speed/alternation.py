"""Both sides' processes, a step of each in turn, and what is to be said of the pairs."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from tqdm import tqdm

from grpo_core.config import GRPOConfig

Step = dict[str, float]  # seconds, generation_seconds, tokens, reward, peak_bytes (of the process so far)
GB = 1e9
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class Pairs:
    """The steps of both sides, the warm-up's first; the nth of each were taken one after the other."""

    ours: list[Step]
    theirs: list[Step]
    warm_up: int

    def ratios(self) -> list[float]:
        """Their seconds over ours, pair by pair, warm-up left out: how many times as fast this project is."""
        pairs = zip(self.ours[self.warm_up :], self.theirs[self.warm_up :], strict=True)
        return [theirs["seconds"] / ours["seconds"] for ours, theirs in pairs]

    def memory_ratio(self) -> float:
        """The peak of this project's process over that of TRL's."""
        return self.ours[-1]["peak_bytes"] / self.theirs[-1]["peak_bytes"]


def alternate(config: GRPOConfig, steps: int, warm_up: int) -> Pairs:
    """`warm_up + steps` steps of each side, in turn; which goes first changes from pair to pair."""
    from benchmarks.speed import ours, theirs

    threads = torch.get_num_threads()
    pairs = Pairs([], [], warm_up)
    with _side(ours.serve, config, threads) as our_side, _side(theirs.serve, config, threads) as their_side:
        for number in tqdm(range(warm_up + steps), desc="pairs", disable=None):
            turns = [(our_side, pairs.ours), (their_side, pairs.theirs)]
            for connection, taken in turns if number % 2 else reversed(turns):
                connection.send("step")
                taken.append(connection.recv())
    return pairs


@contextmanager
def _side(serve: Callable[..., None], config: GRPOConfig, threads: int) -> Iterator[Connection]:
    """A process of its own that has loaded everything and waits."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, config, threads), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of the pipe
    try:
        here.recv()
        yield here
        here.send(None)
        process.join(timeout=60)
    finally:
        process.kill()


def table(pairs: Pairs) -> list[list[str]]:
    """One line a side, the warm-up left out: medians, and the process's peak memory."""
    rows = [
        [
            "",
            "s a step (median)",
            "of it sampling",
            "completion tokens/s",
            "mean tokens a completion batch",
            "peak memory",
        ]
    ]
    for name, steps in (("this project", pairs.ours), ("TRL", pairs.theirs)):
        timed = steps[pairs.warm_up :]
        seconds = statistics.median(step["seconds"] for step in timed)
        sampling = statistics.median(step["generation_seconds"] for step in timed)
        rate = sum(step["tokens"] for step in timed) / sum(step["seconds"] for step in timed)
        tokens = statistics.mean(step["tokens"] for step in timed)
        peak = f"{steps[-1]['peak_bytes'] / GB:.2f} GB"
        rows.append([name, f"{seconds:.2f}", f"{sampling:.2f}", f"{rate:.0f}", f"{tokens:.0f}", peak])
    return rows


def learning(
    pairs: Pairs, levels: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9), window: int = 5
) -> list[dict[str, Any]]:
    """Seconds of steps that each side needs until its mean reward over `window` steps reaches a level; None: never."""
    reached = []
    for level in levels:
        seconds = [_seconds_until(level, steps, window) for steps in (pairs.ours, pairs.theirs)]
        reached.append({"level": level, "ours": seconds[0], "theirs": seconds[1]})
    return reached


def _seconds_until(level: float, steps: list[Step], window: int) -> float | None:
    for end in range(window, len(steps) + 1):
        if statistics.mean(step["reward"] for step in steps[end - window : end]) >= level:
            return sum(step["seconds"] for step in steps[:end])
    return None

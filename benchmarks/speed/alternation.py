"""Both sides' processes, a step of each in turn, and what is to be said of the pairs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
from tqdm import tqdm

from grpo_core.config import GRPOConfig

Step = dict[str, float]  # seconds, generation_seconds, tokens, reward, peak_bytes (of the process so far)


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


def alternate(config: GRPOConfig, steps: int, warm_up: int, same_allocator: bool) -> Pairs:
    """`warm_up + steps` steps of each side, in turn; which goes first changes from pair to pair. `same_allocator`:
    TRL's process keeps its freed memory, too (sft_core/model/allocator.py)."""
    from benchmarks.speed import ours, theirs

    threads = torch.get_num_threads()
    pairs = Pairs([], [], warm_up)
    with (
        _side(ours.serve, config, threads) as our_side,
        _side(theirs.serve, config, threads, same_allocator) as their_side,
    ):
        for number in tqdm(range(warm_up + steps), desc="pairs", disable=None):
            turns = [(our_side, pairs.ours), (their_side, pairs.theirs)]
            for connection, taken in turns if number % 2 else reversed(turns):
                connection.send("step")
                taken.append(connection.recv())
    return pairs


@contextmanager
def _side(serve: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    """A process of its own that has loaded everything and waits."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, *arguments), daemon=True)
    process.start()
    there.close()  # so that the end of the process is the end of the pipe
    try:
        here.recv()
        yield here
        with suppress(BrokenPipeError):  # TRL's side is at its end after the last step
            here.send(None)
        process.join(timeout=60)
    finally:
        process.kill()

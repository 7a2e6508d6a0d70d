"""Several processes for one run, as torchrun starts them: who am I, add this up, gather those, let the first do that.

Every rank holds all of a step: its rows, rewards and weights. Only the work is split: a rank samples its prompts,
scores its completions, learns its rows. What they find is exchanged at once, so that all that is decided, normalised,
counted or logged is so over the whole step, by each rank in the same way. Without torchrun there is one rank, and each
function here returns what it was given.

Control goes over gloo, gradients on a GPU over NCCL.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sft_core.errors import Refused

T = TypeVar("T")

PATIENCE = 1.0  # seconds in which other ranks, too, find that one is lost
BUCKET = 2**24  # numbers that are added up at a time: 64 MB of float32


class Lost(RuntimeError):
    """Another rank has ended, or hangs; the message names it. Its checkpoint is this rank's, too."""


class Place:
    """This process among the others; `sft_core.run.joined` sets it."""

    rank, world, beside = 0, 1, 1  # `beside`: how many share this machine
    alone = False  # whether each does all of the work
    store: Any = None
    hosts = False  # whether the store is in this process
    calls, waited = 0, 0.0  # of collectives; seconds within them


here = Place()


def world() -> int:
    """How many ranks share the work."""
    return 1 if here.alone else count()


def count() -> int:
    """How many ranks there are, before they meet, too."""
    return here.world


def rank() -> int:
    """This process's number, from 0."""
    return 0 if here.alone else here.rank


def first() -> bool:
    """Whether this rank is the one that writes and speaks."""
    return here.rank == 0


def beside() -> int:
    """How many ranks share this machine's memory."""
    return here.beside


def check_rows(flag: str, rows: int) -> None:
    """
    Raises:
        Refused: `flag` gives fewer rows than there are ranks.
    """
    if rows < world():
        raise Refused(f"{flag}: {rows} rows are too few for {world()} ranks, of which each needs one")


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this rank does all of the work, as if there were no other."""
    before, here.alone = here.alone, True
    try:
        yield
    finally:
        here.alone = before


# --- what they exchange


def gathered(value: T, phase: str) -> list[T]:
    """What each rank has found, in their order. `phase`: what for, as a rank that never comes is told of."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    with _exchange(phase):
        dist.all_gather_object(found, value)
    return cast("list[T]", found)


def by_first(run: Callable[[], T], phase: str) -> T:
    """Let rank 0 do something alone; all get what it returns, and none goes on before."""
    return gathered(run() if rank() == 0 else cast(T, None), phase)[0]


def whole(part: Tensor, phase: str) -> Tensor:
    """The sum of all ranks' tensors of this shape: where each has filled its own rows and the others' are 0, all rows;
    of a number, the sum."""
    if world() == 1:
        return part
    total = part.detach().clone()
    with _exchange(phase):
        dist.all_reduce(total)
    return total


def share(count: int) -> range:
    """This rank's part of `count` things that stand in a row."""
    return range(count * rank() // world(), count * (rank() + 1) // world())


def add_up_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Each gradient becomes the sum of all ranks'. A parameter that has one on some ranks only adds nothing on the
    others; one that has none anywhere still has none."""
    if world() == 1:
        return
    counts = whole(torch.tensor([int(parameter.grad is not None) for parameter in parameters]), "gradients")
    used = [parameter for parameter, count in zip(parameters, counts.tolist(), strict=True) if count]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([cast(Tensor, parameter.grad) for parameter in used]):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        with _exchange("gradients"):
            dist.all_reduce(flat)
        for gradient, total in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype side by side, up to BUCKET numbers of them."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.numel() for t in (*bucket, tensor)) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def at_once(phase: str) -> Iterator[None]:
    """A block in which all ranks compute, and exchange weights or gradients on the way (sft_core.learn.shards).

    Raises:
        Lost: not all ranks have come.
    """
    if world() == 1:
        yield
        return
    start = time.perf_counter()
    _come_to(phase)
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        seconds = time.perf_counter() - start
        _come_to(phase)  # as all do who have met an error here, and are not the one that is lost
        time.sleep(PATIENCE)
        raise Lost(_who_is_missing(phase, seconds, error)) from error


def waited() -> float:
    """Seconds that this rank has spent waiting for others, and exchanging."""
    return here.waited


def times(seconds: float, waited: float) -> dict[str, Any]:
    """For the log: each rank's seconds of a step, and the share of all of them that went into waiting and exchange.
    Nothing where there is one rank."""
    if world() == 1:
        return {}
    each = gathered((seconds, waited), "log")
    total = sum(own for own, _ in each)
    return {"rank_time_s": [own for own, _ in each], "waiting_share": sum(w for _, w in each) / total}


@contextmanager
def _exchange(phase: str) -> Iterator[None]:
    """One collective call.

    Raises:
        Lost: not all ranks have come.
    """
    start = time.perf_counter()
    try:
        _come_to(phase)
        yield
    except RuntimeError as error:  # gloo's, of a connection that has closed or a time that is over
        raise Lost(_who_is_missing(phase, time.perf_counter() - start, error)) from error
    here.waited += time.perf_counter() - start


def _come_to(phase: str) -> None:
    here.calls += 1
    here.store.set(f"at/{here.rank}", f"{here.calls} {phase}")


def _who_is_missing(phase: str, seconds: float, error: RuntimeError) -> str:
    behind = []
    for other in range(here.world):
        calls, _, last = (
            here.store.get(f"at/{other}").decode().partition(" ")
            if here.store.check([f"at/{other}"])
            else ("0", "", "the start")
        )
        if int(calls) < here.calls:
            behind.append(f"rank {other} (last seen at: {last})")
    who = ", ".join(behind) or f"another rank ({' '.join(str(error).split())[:100]})"
    return f"{who} has ended or hangs: after {seconds:.0f} seconds it has not come to: {phase}"

"""How ranks meet and end: what torchrun says of this process, and which of them speaks."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from sft_core.learn.ranks import Lost, first, gathered, here

PATIENCE = 2.0  # seconds in which rank 0 may say what this rank has to say, too


@contextmanager
def joined() -> Iterator[None]:
    """The outermost block of a program. Rank 0 prints as a process alone does. What the others print is held back; of
    an error that ends the run one rank tells: rank 0 where it has met one itself, else the first that has."""
    if not _under_torchrun():
        yield
        return
    _open_store()
    real, held = (sys.stdout, sys.stderr), _Held()
    if not first():
        sys.stdout, sys.stderr = io.StringIO(), held
    try:
        yield
    except Lost as error:
        sys.stdout, sys.stderr = real
        if _speaks(0.0):
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except BaseException as error:
        sys.stdout, sys.stderr = real
        if not _tells(error, held.last):
            raise SystemExit(getattr(error, "code", 1)) from None
        raise
    finally:
        sys.stdout, sys.stderr = real
        _leave()


def meet(patience_s: float) -> None:
    """Begin to work together. A rank that keeps the others waiting for longer than `patience_s` seconds ends the run.
    Call when all that each can check by itself is checked, and before anything is written."""
    if not _under_torchrun():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", here.rank)) % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", here.store),  # type: ignore[attr-defined]
        rank=here.rank,
        world_size=here.world,
        timeout=timedelta(seconds=patience_s),
    )
    here.alone = False
    gathered(None, "start")


def _under_torchrun() -> bool:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in names) and int(os.environ["WORLD_SIZE"]) > 1


def _open_store() -> None:
    given = os.environ
    here.rank, here.world = int(given["RANK"]), int(given["WORLD_SIZE"])
    here.beside = int(given.get("LOCAL_WORLD_SIZE", here.world))
    here.calls, here.alone = 0, True  # until they meet
    theirs = given.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which outlives each rank
    where = (given["MASTER_ADDR"], int(given["MASTER_PORT"]))
    here.hosts = first() and not theirs
    store = dist.TCPStore(*where, None, here.hosts)  # type: ignore[attr-defined]
    here.store = dist.PrefixStore(  # type: ignore[attr-defined]
        f"grpo/{given.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
    )


def _leave() -> None:
    with suppress(RuntimeError):
        if dist.is_initialized():
            dist.destroy_process_group()
        end, left = time.monotonic() + PATIENCE, here.store.add("left", 1)
        while here.hosts and left < here.world and time.monotonic() < end:
            time.sleep(0.01)
            left = here.store.add("left", 0)
    here.rank, here.world, here.beside, here.store, here.alone = 0, 1, 1, None, False


class _Held(io.StringIO):
    """A stream that shows nothing, and remembers the last text."""

    last = ""

    def write(self, text: str) -> int:
        self.last = text.strip() or self.last
        return len(text)


def _tells(end: BaseException, held: str) -> bool:
    """Whether Python is to say why this rank ends; what was held back of that is told here."""
    code = end.code if isinstance(end, SystemExit) else None
    if isinstance(end, SystemExit) and code in (None, 0):
        return True
    if isinstance(end, KeyboardInterrupt) or code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        _speaks(0.0)  # so that the others, whom this one leaves alone, need not
        return first()
    if first():
        _speaks(0.0)
        return True
    speaks = _speaks(PATIENCE)
    if speaks and code:
        print(held, file=sys.stderr)
    return speaks


def _speaks(patience_s: float) -> bool:
    """Whether this rank is the first to tell of an error, after so many seconds for rank 0."""
    end, mine = time.monotonic() + patience_s, str(here.rank)
    try:
        while time.monotonic() < end and not here.store.check(["told"]):
            time.sleep(0.05)
        return bool(here.store.compare_set("told", "", mine).decode() == mine)
    except RuntimeError:  # the store has gone with rank 0
        return False

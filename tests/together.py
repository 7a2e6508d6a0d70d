"""Several ranks on this machine, as torchrun would start them: forked children of this process, so that none waits for
its imports, over gloo."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from tests.killing import forked


def together(world: int, program: Callable[[], object], folder: Path) -> list[int]:
    """Call `program` in so many ranks; their exit codes. What rank k prints goes to `folder`/k.out and k.err."""
    pids, store = start(world, program, folder)
    return ended(pids)


def ended(pids: list[int]) -> list[int]:
    """The exit codes of these processes, once all have ended."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def start(world: int, program: Callable[[], object], folder: Path) -> tuple[list[int], dist.TCPStore]:
    """Call `program` in so many ranks; their process ids, and the store by which they meet, which is to be kept as long
    as they live."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    where["TORCHELASTIC_USE_AGENT_STORE"] = "True"

    def as_rank(rank: int) -> int:
        def run() -> None:
            os.environ.update(where, RANK=str(rank))
            program()

        return forked(run, folder / f"{rank}.out", folder / f"{rank}.err")

    pids = [as_rank(rank) for rank in range(world)]  # first: a fork should not have the store's threads
    return pids, dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)

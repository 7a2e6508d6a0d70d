"""What ranks exchange, over the backend that they would use, by as many ranks as torchrun has started:

    torchrun --nproc_per_node 1 -m benchmarks.sitting.collectives cuda

With one rank every sum and every collection is known: what was given. (`sft_core.learn.ranks` asks nobody then; this
does.) Exit code 1 where one is wrong.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from sft_core.learn.ranks import BUCKET

REPEATS = 5


def gathered(tensor: Tensor) -> Tensor:
    into = torch.zeros_like(tensor)
    dist.all_gather_into_tensor(into, tensor)
    return into


def scattered(tensor: Tensor) -> Tensor:
    into = torch.zeros_like(tensor)
    dist.reduce_scatter_tensor(into, tensor)
    return into


def added(tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor)
    return tensor


def sent(tensor: Tensor) -> Tensor:
    dist.broadcast(tensor, src=0)
    return tensor


EXCHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "all_reduce": added,
    "all_gather_into_tensor": gathered,
    "reduce_scatter_tensor": scattered,
    "broadcast": sent,
}


def main() -> int:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")  # as sft_core.run.joined does
    try:
        assert dist.get_world_size() == 1, "known answers are those of one rank"
        wrong, times = [], []
        for name, exchange in EXCHANGES.items():
            for dtype, size in ((torch.float32, BUCKET), (torch.float16, 1000)):
                given = (torch.arange(size, device=device) % 1000).to(dtype)
                start = time.perf_counter()
                for _ in range(REPEATS):
                    result = exchange(given.clone())
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append((time.perf_counter() - start) / REPEATS)
                if not torch.equal(result, given):
                    wrong.append(f"{name} in {dtype}")
        found: list[object] = [None]
        dist.all_gather_object(found, {"rows": [1, 2, 3]})
        wrong += ["all_gather_object"] * (found != [{"rows": [1, 2, 3]}])
        names = ", ".join(f"{name} {1000 * seconds:.2f}" for name, seconds in zip(EXCHANGES, times[::2], strict=True))
        version = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device.type == "cuda" else ""
        print(f"figure: {len(EXCHANGES) + 1} kinds{version}; ms for 64 MB: {names}; wrong: {wrong or 'none'}")
        return 1 if wrong else 0
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())

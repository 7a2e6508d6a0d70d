"""Runs that are killed without warning and gone on with, again and again. By hand, on the embedded job:

    python -m tests.killing --kills 20 --folder FOLDER -- --preset tiny

Each run is a forked child of this process, so that none waits for its imports, and is killed with SIGKILL after a
random time. `differences` then compares what is left with a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

import grpo_core.train
import sft_core.train
from benchmarks.sitting.equal import is_a_time as is_a_time
from benchmarks.sitting.equal import log as log
from benchmarks.sitting.equal import unequal_files

Program = Callable[[Sequence[str]], None]


def child(program: Program, argv: Sequence[str], out: Path) -> int:
    """Start the program in a forked process, what it prints appended to a file; its process id."""
    return forked(lambda: program(argv), out, out)


def forked(run: Callable[[], object], out: Path, err: Path) -> int:
    """Call `run` in a forked process, what it prints appended to two files; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    # tqdm's lock is a semaphore that forked processes share: a child killed while it draws its bar would keep it.
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(1)  # the parent's other threads are not there in a fork, and waiting for them never ends
    try:
        for number, path in ((1, out), (2, err)):
            with path.open("a") as file:
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        run()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # whatever happens: there must not be a second pytest
            os._exit(code)


def finished_in(pid: int, seconds: float) -> int | None:
    """The exit code of a child that ends within so many seconds; None: it is still at work."""
    end = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def run_killed(
    program: Program, argv: Sequence[str], out: Path, kills: int, longest: float, seed: int = 0
) -> tuple[int, int]:
    """Run under --resume; kill `kills` times after at most so many seconds; at last let it finish.

    Returns:
        How many kills found it at work, and the exit code of the end.
    """
    rng, killed = random.Random(seed), 0
    for _ in range(kills):
        pid = child(program, [*argv, "--resume"], out)
        code = finished_in(pid, rng.uniform(0, longest))
        if code is not None:
            return killed, code
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
    code = finished_in(child(program, [*argv, "--resume"], out), 3600)
    assert code is not None
    return killed, code


def differences(undisturbed: Path, other: Path) -> list[str]:
    """What tells two run folders apart, times aside; nothing where the runs are one and the same to the bit."""
    found = unequal_files(undisturbed, other)
    return [*found, "tensorboard"] if shown(undisturbed) != shown(other) else found


def shown(run: Path) -> dict[str, list[tuple[int, str]]]:
    """TensorBoard's curves and completions, without the times."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not is_a_time(tag)]
    curves = {tag: [(event.step, str(event.value)) for event in events.Scalars(tag)] for tag in tags}
    texts = events.Tensors("completion/text_summary") if "completion/text_summary" in events.Tags()["tensors"] else []
    return curves | {"completion": [(event.step, event.tensor_proto.string_val[0].decode()) for event in texts]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=15.0, help="seconds that a run lives at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for both runs")
    parser.add_argument("--program", choices=["grpo", "sft"], default="grpo")
    parser.add_argument("flags", nargs="*", help="the program's own, after --")
    given = parser.parse_args()
    program = {"grpo": grpo_core.train.main, "sft": sft_core.train.main}[given.program]
    given.folder.mkdir(parents=True)
    quiet = [*given.flags, "--no_progress"]
    whole, parts = given.folder / "undisturbed" / "run", given.folder / "killed" / "run"
    start = time.monotonic()
    code = finished_in(child(program, [*quiet, "--output_dir", str(whole)], given.folder / "undisturbed.txt"), 3600)
    took = time.monotonic() - start
    print(f"undisturbed: exit code {code} after {took:.0f} s", flush=True)
    start = time.monotonic()
    killed, code = run_killed(
        program,
        [*quiet, "--output_dir", str(parts)],
        given.folder / "killed.txt",
        given.kills,
        given.longest,
        given.seed,
    )
    print(f"killed {killed} times: exit code {code} after {time.monotonic() - start:.0f} s")
    found = differences(whole, parts)
    print("bit-equal: weights, log, TensorBoard, completions, held-out answers" if not found else f"differs: {found}")
    raise SystemExit(bool(found) or code)


if __name__ == "__main__":
    main()

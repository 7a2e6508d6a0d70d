"""Small runs in forked children, and children in which writing goes wrong at a chosen moment."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from transformers import AutoModelForCausalLM

import grpo_core.train
from tests.helpers import tiny_model, tokenizer
from tests.killing import Program, child, finished_in

Action = Callable[[], None]

# Python warns of a fork beside threads; the children here use one thread, and the parent has no pool of threads alive.
FORKS = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

STEPS = 3
SMALL = ["--task", "arithmetic", "--prompt_format", "hash", "--system_prompt", "", "--max_prompt_tokens", "90"]
SMALL += ["--device", "cpu", "--no_progress", "--precision", "float32", "--max_steps", str(STEPS), "--lr", "1e-2"]
GRPO = ["--prompts_per_step", "2", "--group_size", "2", "--max_completion_tokens", "4", "--eval_problems", "2"]
GRPO += ["--rewards", "tests.helpers:length_reward", "--show_every", "2"]
SFT = ["--batch_size", "4", "--max_completion_tokens", "30", "--eval_problems", "2", "--eval_every", "2"]


def save_start(folder: Path) -> Path:
    """The cheapest model, with its tokenizer, in a folder."""
    tiny_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)  # children inherit what transformers builds at a first load
    return folder


def command(model: Path, run: Path, *flags: str, own: Sequence[str] = GRPO) -> list[str]:
    """A small run's flags; it saves after each step unless `flags` say otherwise."""
    return ["--model", str(model), *SMALL, *own, "--save_every", "1", "--output_dir", str(run), *flags]


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, negative where a signal ended it, and what it printed."""

    code: int
    text: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith("error: ")]


def ended(argv: Sequence[str], before: Action | None = None, program: Program = grpo_core.train.main) -> Ended:
    """Run the program in a child, in which `before` is called first."""
    reading, writing = os.pipe()  # a disk that is full takes no output either; it is short enough for a pipe to hold

    def prepared(argv: Sequence[str]) -> None:
        if before:
            before()
        program(argv)

    pid = child(prepared, argv, Path(f"/dev/fd/{writing}"))
    os.close(writing)
    code = finished_in(pid, 60)
    if code is None:
        os.kill(pid, signal.SIGKILL)
    with os.fdopen(reading, errors="replace") as printed:
        text = printed.read()
    assert code is not None, text
    return Ended(code, text)


# --- what goes wrong


def fails(number: int = errno.EIO) -> Action:
    """The write raises."""

    def act() -> None:
        raise OSError(number, os.strerror(number))

    return act


def dies() -> None:
    """The process is gone, as after SIGKILL."""
    os._exit(9)


def sends(number: int, times: int = 1) -> Action:
    """A signal to this process."""

    def act() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)

    return act


def disk_takes(size: int) -> Action:
    """From here on no file can grow beyond so many bytes: what fits is written, then the system says no."""

    def act() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return act


# --- and when


def on_call(owner: Any, name: str, number: int, act: Action, after: bool = False) -> None:
    """The `number`-th call of `owner.name`, counted from 1, does this first, or last."""
    own, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        now = calls == number
        if now and not after:
            act()
        result = own(*args, **kwargs)
        if now and after:
            act()
        return result

    setattr(owner, name, wrapped)


def on_write(owner: Any, name: str, number: int, act: Action, note: Path | None = None) -> None:
    """The `number`-th write of the first call of `owner.name` does this first. A write: a file opened to be written, a
    fsync, a folder made, anything renamed, removed or cut, by Python or by safetensors. `note` gets one line each."""
    own, watching, done, count = getattr(owner, name), False, False, 0

    def write(what: str) -> None:
        nonlocal count, watching
        if not watching or threading.current_thread() is not threading.main_thread():
            return
        count += 1
        if note:
            watching = False
            with note.open("a") as file:
                file.write(what + "\n")
            watching = True
        if count == number:
            watching = False
            act()
            watching = True

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            write(f"open {args[0]}")
        elif event == "os.mkdir" and os.path.isdir(args[0]):
            pass  # `exist_ok`
        elif event in ("os.mkdir", "os.rename", "os.rmdir", "os.remove", "os.truncate"):
            write(f"{event} {args[0]}")

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal watching, done
        watching, done = not done, True
        try:
            return own(*args, **kwargs)
        finally:
            watching = False

    for module, function in ((os, "fsync"), (safetensors.torch, "serialize_file")):
        its = getattr(module, function)

        def announced(*args: Any, its: Any = its, function: str = function, **kwargs: Any) -> Any:
            write(function)
            return its(*args, **kwargs)

        setattr(module, function, announced)
    sys.addaudithook(audit)
    setattr(owner, name, watched)

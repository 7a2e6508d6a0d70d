"""How far a run has come, and how it is saved, interrupted and resumed.

A step moves the weights in its last moments only. Until then, and from the moment its log lines are written, the run is
*at rest*: all that has moved since the last completed step (random states, the data's position) is known from before.
Whatever ends the run at rest (Ctrl-C, SIGTERM, a reward function that raises, memory that runs out), a checkpoint of
the last completed step is written first. A signal that comes during the updates waits until the step is completed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from sft_core.config import RunConfig
from sft_core.errors import Refused
from sft_core.learn import ranks
from sft_core.learn.optim import Optimizer
from sft_core.learn.shards import is_shared, load_weights, whole_policy
from sft_core.model.policy import Policy
from sft_core.run.checkpoint import (
    NotSaved,
    checkpoints,
    load_state,
    save_state,
)
from sft_core.run.randomness import random_state, set_random_state
from sft_core.run.runlog import RunFolder

# Ctrl-C; what a machine that shuts down sends; what a closed terminal sends (not on Windows).
ENDS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Part(Protocol):
    """Something that changes during a run besides the weights."""

    def numbers(self) -> dict[str, Any]:
        """The small part of its state: copied at the end of each step."""

    def tensors(self) -> dict[str, Tensor]:
        """The large part, which changes with the weights only: read when a checkpoint is written."""

    def load(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go back to where `numbers` and `tensors` were taken."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or another ending signal, after which the run is saved and ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Progress:
    """The last completed step of a run, 0 before the first, with what a checkpoint of it needs.

    Where `folder` was opened to resume a run, the weights and all parts are restored first.

    Args:
        parts: by name; the optimizer is added to them.
        identity: what the run began with and a checkpoint does not hold, as texts that distinguish it from others.

    Raises:
        Refused: `identity` differs from that of the run to be resumed.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        policy: Policy,
        optimizer: Optimizer,
        parts: Mapping[str, Part],
        identity: dict[str, Any],
    ) -> None:
        self.folder, self.config, self.policy, self.optimizer = folder, config, policy, optimizer
        self.parts: dict[str, Part] = {"optimizer": optimizer, **parts}
        self.identity = {"precision": policy.precision.name, **identity}
        self.again = folder.path  # what --resume is to name when this has ended early
        self.step, self.signal, self.ending = 0, 0, False
        self.shared = is_shared(policy.model)  # then no rank can save what the others do not
        if folder.checkpoint:
            self._restore(folder.checkpoint)
            folder.resume_from(folder.checkpoint)
        folder.evaluations = ranks.by_first(lambda: folder.evaluations, "log")
        self.saved, self.saved_at = self.step, time.monotonic()
        self._rest()

    def completed(self, step: int, last: int) -> None:
        """Call when the step's updates and log lines are done; writes a checkpoint where one is due, and of the step
        `last`, from which --resume with more --max_steps goes on.

        Raises:
            Interrupted: a signal came during the updates.
            NotSaved: no room for the checkpoint.
        """
        self.step = step
        self._rest()
        if self.shared:
            self.signal = max(ranks.gathered(self.signal, "signals"))
        if self.signal:
            if self.shared:
                self.save()
            raise Interrupted(self.signal)
        steps, seconds = self.config.save_interval
        if (steps and step % steps == 0) or (seconds and time.monotonic() - self.saved_at >= seconds):
            self.save()
        elif step == last and (steps or seconds):
            try:
                self.save()
            except NotSaved as error:  # there may still be room for the final model, which is smaller
                print(f"no checkpoint of the last step for a longer run: {error}", file=sys.stderr)

    def save(self) -> Path:
        """Write a checkpoint of the last completed step, and delete those that --keep_last does not ask for.

        Raises:
            NotSaved: the disk is full, or gone. The checkpoints before are as they were.
        """
        assert self.at_rest
        tensors = {name: part.tensors() for name, part in self.parts.items()}
        policy = whole_policy(self.policy)

        def write(folder: Path) -> None:
            policy.save(folder)
            save_state(folder, {**self.state, "tensors": tensors})

        path = self.folder.save_checkpoint(self.step, write)
        self.saved, self.saved_at = self.step, time.monotonic()  # first: a signal from here on need not save again
        self.folder.prune(self.config.keep_last)
        return path

    @property
    def at_rest(self) -> bool:
        """Whether weights and moments are those of the last completed step."""
        return self.optimizer.passes == self.passes

    @contextmanager
    def kept(self) -> Iterator[None]:
        """If the block fails at rest, a checkpoint is written first; stderr says what was saved where."""
        with self._signals():
            try:
                yield
            except (Exception, KeyboardInterrupt) as error:
                self._save_at_last(error)
                raise

    def _save_at_last(self, error: BaseException) -> None:
        failed, self.ending = "", True
        if self.shared and self.saved < self.step:
            failed = f"step {self.step} is not saved: of the weights each rank had a part; "
        elif self.at_rest and self.saved < self.step and not isinstance(error, NotSaved):
            try:
                self.save()
            except Exception as another:  # a device or a disk that has failed fails here again
                failed = f"step {self.step} is not saved ({another}); "
        there = checkpoints(self.folder.path)
        found = f"saved: {there[-1]}; go on with --resume {self.again}" if there else "no checkpoint was written"
        print(f"\n{failed}{found}", file=sys.stderr)

    def _rest(self) -> None:
        self.state = {
            "step": self.step,
            "random": random_state(),
            "logs": self.folder.sizes(),
            "parts": {name: part.numbers() for name, part in self.parts.items()},
            "identity": self.identity,
        }
        self.passes = self.optimizer.passes  # last: from here on a signal may raise

    def _restore(self, checkpoint: Path) -> None:
        state = load_state(checkpoint)
        steps = self.optimizer.total_steps // getattr(self.config, "mu", 1)
        if state["step"] > steps:
            raise Refused(
                f"--resume {self.folder.path}: {checkpoint.name} is past the {steps} steps that are asked for"
            )
        for name, value in self.identity.items():
            if (then := state["identity"].get(name)) != value:
                changed = f"the {name} is not what it was when the run began ({then}; now {value})"
                raise Refused(f"--resume {self.folder.path}: {changed}")
        load_weights(self.policy, lambda policy: policy.load(checkpoint))
        for name, part in self.parts.items():
            part.load(state["parts"][name], state["tensors"][name])
        set_random_state(state["random"])
        self.step = state["step"]

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and its like raise `Interrupted`: at once where the run is at rest, else when the step is completed.
        A second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread can handle signals
            return
        # One that is ignored, as under nohup, stays so.
        numbers = [number for number in ENDS if signal.getsignal(number) is not signal.SIG_IGN]

        def answer(number: int, frame: FrameType | None) -> None:
            # Of ranks all get Ctrl-C, and then torchrun's SIGTERM, too, which should not cut the saving short.
            then = signal.SIG_DFL if ranks.world() == 1 else signal.SIG_IGN
            for each in numbers:
                signal.signal(each, then)
            self.signal = number
            if self.at_rest and not (self.ending or self.shared):
                raise Interrupted(number)
            if then == signal.SIG_DFL:
                with suppress(OSError):  # not print(), which the signal may have come in the middle of
                    os.write(2, b"\nthe step is saved first; a second signal ends the process at once\n")

        before = {number: signal.signal(number, answer) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def weights_identity(policy: Policy) -> str:
    """A CRC of every weight, which distinguishes models of the same shape. About a second per gigabyte."""
    model = whole_policy(policy).model

    def crc() -> str:
        found = 0
        for name, weight in sorted(model.state_dict().items()):
            raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
            found = zlib.crc32(raw.numpy(), zlib.crc32(name.encode(), found))
        return f"{found:08x}"

    return ranks.by_first(crc, "weights")

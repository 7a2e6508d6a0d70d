"""Where a run can be watched: TensorBoard files in its folder, and a run at Weights & Biases.

Both show what the run folder holds, and nothing else: the config, the numbers of log.jsonl, the completions that
--show_every shows. When a run is resumed, TensorBoard's files are rewritten from the logs, and W&B is
sent what it has not received yet.

No training ends because it cannot be watched: a tracker that fails is left out, with a line on stderr.
"""

from __future__ import annotations

import html
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import yaml

from rewards.jsonl import each_jsonl
from sft_core.config import FolderConfig


class Tracker(Protocol):
    """One place to watch a run in. If it raises, it is closed, and the run continues."""

    name: str

    def scalars(self, kind: str, step: int, values: dict[str, float], at: float) -> None:
        """The numbers of a log line, written `at` seconds after 1970; NaN: the number was not finite."""

    def completion(self, step: int, text: str, at: float | None) -> None:
        """What the policy answered in this step."""

    def close(self, failed: bool) -> None:
        """The run has ended, or was ended."""


class Trackers:
    """All places where a run is shown.

    Args:
        run: its folder, which holds a config.yaml.

    Raises:
        OSError: TensorBoard's files cannot be written, so nothing else could be.
    """

    def __init__(self, run: Path, config: FolderConfig) -> None:
        self.live: list[Tracker] = []
        self.show_every: int = getattr(config, "show_every", 0)
        self.times: dict[int, float] = {}  # of the log lines, by step
        if config.tensorboard:
            self.live.append(TensorBoard(run))
        if getattr(config, "track", "none") == "wandb":
            try:
                self.live.append(WandB(run))
            except Exception as error:
                _say("W&B could not be reached, and the run goes on without it", error)

    def log(self, record: dict[str, Any]) -> None:
        """Show a line of log.jsonl."""
        kind, step = record["kind"], record["step"]
        at = self.times[step] = datetime.fromisoformat(record["timestamp_iso"]).timestamp()
        values = {
            name: math.nan if value is None else value
            for name, value in record.items()
            if name != "step" and (value is None or isinstance(value, (int, float)))
        }
        self._each(lambda tracker: tracker.scalars(kind, step, values, at))

    def completion(self, record: dict[str, Any]) -> None:
        """Show a record of completions.jsonl."""
        step, text = record["step"], shown(record)
        self._each(lambda tracker: tracker.completion(step, text, self.times.get(step)))

    def completions_of(self, path: Path) -> None:
        """Show those of completions.jsonl that --show_every asks for: each time the step's first."""
        if not (self.live and self.show_every):
            return
        try:
            for record in each_jsonl(path, torn_end=True):
                if record["row"] == 0 and record["step"] % self.show_every == 0:
                    self.completion(record)
        except (OSError, KeyError, TypeError, ValueError) as error:
            _say("some of the earlier completions are not shown again", error)

    def close(self, failed: bool) -> None:
        self._each(lambda tracker: tracker.close(failed))
        self.live = []

    def _each(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self.live):
            try:
                what(tracker)
            except Exception as error:
                _say(f"{tracker.name} could not be written and ends here", error)
                self.live.remove(tracker)


class TensorBoard:
    """Event files, rewritten at each start, so that a resumed run shows no step twice."""

    name = "TensorBoard"

    def __init__(self, run: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if (run / "tensorboard").exists():
            shutil.rmtree(run / "tensorboard")
        self.writer: Any = SummaryWriter(str(run / "tensorboard"))
        self.writer.add_text("config", _verbatim((run / "config.yaml").read_text(encoding="utf-8")))

    def scalars(self, kind: str, step: int, values: dict[str, float], at: float) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step, walltime=at)

    def completion(self, step: int, text: str, at: float | None) -> None:
        self.writer.add_text("completion", _verbatim(text), step, walltime=at)

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run at Weights & Biases, with W&B's own WANDB_PROJECT, WANDB_NAME, WANDB_MODE, ... where they are set.

    Its id, and the last step of each kind that it was sent, are in wandb/sent.json of the run folder. They are noted
    first and sent then: a process that is killed in between leaves a gap of one line there, rather than a line twice.
    """

    name = "W&B"

    def __init__(self, run: Path) -> None:
        # Where the network fails for good, W&B would wait for it at the end of the run, however long.
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "600")
        import wandb

        self.wandb, self.note = wandb, run / "wandb" / "sent.json"
        self.sent: dict[str, Any] = {"id": os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]}
        if self.note.exists():
            self.sent = json.loads(self.note.read_text())
        self.note.parent.mkdir(exist_ok=True)
        ours: dict[str, Any] = {"project": "grpo-from-scratch", "name": run.resolve().name, "dir": str(run)}
        self.run: Any = wandb.init(
            id=self.sent["id"],
            resume="allow",
            config=yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")),
            allow_val_change=True,
            **{name: value for name, value in ours.items() if f"WANDB_{name.upper()}" not in os.environ},
        )
        # W&B's own step counts its lines; a run has several in a step, and those of an earlier step after a resume.
        for kind in ("train", "eval", "completion"):
            self.run.define_metric(f"{kind}/*", step_metric="step")

    def scalars(self, kind: str, step: int, values: dict[str, float], at: float) -> None:
        self._send(kind, step, {f"{kind}/{name}": value for name, value in values.items()})

    def completion(self, step: int, text: str, at: float | None) -> None:
        if self._new("completion", step):
            self._send("completion", step, {"completion/text": self.wandb.Html(f"<pre>{html.escape(text)}</pre>")})

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))

    def _new(self, kind: str, step: int) -> bool:
        return step > self.sent.get(kind, -1)

    def _send(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._new(kind, step):
            self.sent[kind] = step
            unfinished = self.note.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(self.sent))  # never waits for the disk: this is done in every step
            unfinished.replace(self.note)
            self.run.log({"step": step, **values})


def shown(completion: dict[str, Any]) -> str:
    """A completion record, for the person who watches."""
    reward = math.nan if completion["reward"] is None else completion["reward"]
    return (
        f"--- step {completion['step']}, reward {reward:.2f}\n"
        f"Question:  {completion['question']}\nExpected:  {completion['expected']}\n"
        f"Response:  {indented(completion['response'])}\nExtracted: {completion['extracted'] or '(no answer found)'}"
    )


def indented(text: str, width: int = 11) -> str:
    """The text's further lines moved to where its first one begins."""
    return text.strip().replace("\n", "\n" + " " * width)


def _verbatim(text: str) -> str:
    """As a code block of TensorBoard's Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _say(what: str, error: Exception) -> None:
    print(f"{what}: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)

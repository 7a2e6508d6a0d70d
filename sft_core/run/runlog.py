"""The run folder: all that a run leaves behind, and nothing elsewhere.

config.yaml         the resolved config; give it to --config to repeat the run
provenance.json     command, versions, commit, hardware, seed, time; the same for each time that it was resumed
log.jsonl           one object per log line; `kind` says which: train, eval
completions.jsonl   every sampled completion of GRPO with its rewards and advantage
tokens.jsonl        its tokens, each with its log-probability (grpo_core/completions.py)
heldout/            step-000000.jsonl, ...: every answer of an evaluation while training
answers.jsonl       every answer of `python -m eval`
summary.json        what was measured, at the end; of `python -m eval` as a table, too: summary.md
tensorboard/, wandb/ the same scalars as log.jsonl, and samples of the completions (sft_core/run/trackers.py)
checkpoints/        step-000100/, ...: models in Hugging Face format, and what --resume needs (`checkpoint`)
final/              the final model or adapter; written last, so a folder that has it is finished
asked.jsonl         what `python -m eval.ask` was answered; not the run's own, so no run deletes it
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import transformers

from rewards.jsonl import read_jsonl
from sft_core.config import NEWEST, PASSING, FolderConfig, as_yaml
from sft_core.errors import Refused
from sft_core.model.policy import Policy
from sft_core.run.checkpoint import (
    Damaged,
    checkpoints,
    load_numbers,
    newest_whole,
    not_saved,
    prune,
    set_aside,
    step_of,
    to_disk,
    verify,
    write_text,
    write_whole,
)
from sft_core.run.lines import append_jsonl, finite, line_of
from sft_core.run.lock import locked
from sft_core.run.longer import has_another_end, refuse_finished, reopen
from sft_core.run.provenance import last_start, provenance, what_changed
from sft_core.run.trackers import Trackers

# Loading and saving are announced by this project where they matter; the libraries' own bars would tear ours apart.
transformers.logging.disable_progress_bar()

LOGS = ("log.jsonl", "completions.jsonl", "tokens.jsonl", "answers.jsonl")
OTHERS = ("summary.json", "summary.md", "heldout", "tensorboard", "plots", "completions.html", "final", "base")
KEPT = ("checkpoints", "wandb")  # where --resume starts from step 0: damaged checkpoints, and what W&B has received


class RunFolder:
    """A run folder that this process alone writes to.

    A new run finds it new or empty (or empties it, under --overwrite). Where --resume finds a whole checkpoint, that is
    `checkpoint`, and `resume_from` is to be called once it is loaded; where it finds none, the run starts from step 0.

    Raises:
        Refused: it holds a run, and neither --resume nor --overwrite was given; another process writes to it; the
            checkpoint that --resume names is damaged.
        NotSaved: the disk is full, or the folder may not be written to.
    """

    def __init__(self, config: FolderConfig, kind: str) -> None:
        self.path = Path(config.output_dir) if config.output_dir else fresh_folder(kind)
        self.config = config
        self.trackers: Trackers | None = None
        self.evaluations: dict[int, dict[str, Any]] = {}  # the log's lines of kind eval, by step
        self.finished = False
        self.ends_elsewhere = False  # whether --resume comes with another --max_steps
        self.checkpoint: Path | None = None
        with not_saved(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock = locked(self.path)
            with self.closed_on_error():
                self._open()

    def _open(self) -> None:
        resume = getattr(self.config, "resume", None)
        self.ends_elsewhere = bool(resume) and has_another_end(self.path, self.config)
        self.finished = bool(resume) and (self.path / "final").is_dir() and not self.ends_elsewhere
        self.checkpoint = _found(self.path, resume) if resume and not self.finished else None
        if self.finished:
            self.close()
        elif not self.checkpoint:
            if self.ends_elsewhere:
                refuse_finished(self.path)
            self._begin(going_on=bool(resume))
            self._show()

    def _begin(self, going_on: bool) -> None:
        """Remove an earlier run's files under --overwrite, and write what is known before the first
        step."""
        config = self.config
        if (self.path / "config.yaml").exists() and not (going_on or config.overwrite):
            raise Refused(f"--output_dir {self.path}: holds a run; --resume goes on with it, --overwrite deletes it")
        # Config and provenance are not among them: they say that the rest is a run's, and are replaced at a stroke.
        for name in (*LOGS, *OTHERS, *([] if going_on else KEPT)):
            entry = self.path / name
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink(missing_ok=True)
        lines = [line for line in as_yaml(config).splitlines() if line.split(":")[0] not in PASSING]
        write_text(self.path / "config.yaml", "\n".join(lines) + "\n")
        _write_json(self.path / "provenance.json", provenance(getattr(config, "seed", None)))

    def resume_from(self, checkpoint: Path) -> None:
        """Set later checkpoints aside, cut the logs to where they were, and note the resume in provenance.json.

        Raises:
            NotSaved: the disk is full, or gone.
            Refused: a line of the log is not JSON.
        """
        with not_saved(self.path):
            for later in checkpoints(self.path):
                if step_of(later) > step_of(checkpoint):
                    print(f"{later} is later: it is set aside as {set_aside(later).name}", file=sys.stderr)
            for name, size in load_numbers(checkpoint)["logs"].items():
                _cut(self.path / name, size)
            if self.ends_elsewhere:
                reopen(self.path, self.config)
            self._note_resume(step_of(checkpoint))
            self._show()
            for answers in (self.path / "heldout").glob("step-*.jsonl"):
                at = step_of(answers.with_suffix(""))
                if at >= step_of(checkpoint) and at not in self.evaluations:
                    answers.unlink()

    def note(self, **found: Any) -> None:
        """Add to what provenance.json says of this start of the run."""
        with suppress(OSError, ValueError):  # provenance that somebody has deleted is no reason to stop
            about = json.loads((self.path / "provenance.json").read_text())
            last_start(about).update(found)
            _write_json(self.path / "provenance.json", about)

    def _note_resume(self, step: int) -> None:
        with suppress(OSError, ValueError):
            about = json.loads((self.path / "provenance.json").read_text())
            now = {"after_step": step, **provenance(getattr(self.config, "seed", None))}
            if changed := what_changed(last_start(about), now):
                print(f"the run continues elsewhere, so not to the same bits: {changed}", file=sys.stderr)
            about.setdefault("resumed", []).append(now)
            _write_json(self.path / "provenance.json", about)

    def _show(self) -> None:
        """Open the trackers, and send them what the logs hold."""
        self.trackers = Trackers(self.path, self.config)
        try:
            lines = read_jsonl(self.path / "log.jsonl")
        except ValueError as error:
            raise Refused(f"{error}; the run can go on without the line") from error
        for record in lines:
            self._remember(record)
        self.trackers.completions_of(self.path / "completions.jsonl")

    def log(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append a line to log.jsonl, and show it. NaN and infinity are written as null: JSON has neither."""
        now = datetime.now(timezone.utc).isoformat()
        record = {"kind": kind, "step": step, "timestamp_iso": now, **finite(values)}
        self.append("log.jsonl", [record])
        self._remember(record)

    def _remember(self, record: dict[str, Any]) -> None:
        if record["kind"] == "eval":
            self.evaluations[record["step"]] = record
        if self.trackers:
            self.trackers.log(record)

    def show(self, completion: dict[str, Any]) -> None:
        """Show a record of completions.jsonl in TensorBoard and W&B."""
        if self.trackers:
            self.trackers.completion(completion)

    def sizes(self) -> dict[str, int]:
        """The length of each log in bytes."""
        paths = {name: self.path / name for name in LOGS}
        return {name: path.stat().st_size if path.exists() else 0 for name, path in paths.items()}

    def _to_disk(self) -> None:
        """Sync the logs to the disk: the next checkpoint relies on them."""
        for name in LOGS:
            if (self.path / name).exists():
                to_disk(self.path / name)

    def answers_path(self, step: int) -> Path:
        """Where the answers of an evaluation are kept."""
        return answers_of(self.path, step)

    def save_answers(self, step: int, answers: Iterable[dict[str, Any]]) -> None:
        self.write(str(self.answers_path(step).relative_to(self.path)), "".join(line_of(answer) for answer in answers))

    def save_final(self, policy: Policy) -> Path:
        """
        Raises:
            NotSaved: the disk is full, or gone.
        """
        return write_whole(self.path / "final", policy.save)

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill the checkpoint of a step, once the logs are safe.

        Raises:
            NotSaved: the disk is full, or gone. The checkpoints before are as they were.
        """

        def fill(folder: Path) -> None:
            self._to_disk()
            write(folder)

        return write_whole(checkpoint_of(self.path, step), fill)

    def prune(self, keep: int) -> None:
        """Delete all but the newest `keep` checkpoints (0: none), and unfinished ones."""
        prune(self.path, keep)

    def append(self, name: str, records: Iterable[dict[str, Any]]) -> None:
        """Add lines to one of the logs."""
        append_jsonl(self.path / name, records)

    def write(self, name: str, text: str) -> None:
        """Write a small file whole."""
        write_text(self.path / name, text)

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Release the folder if the block fails, so that another run of this process may write here."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the trackers and release the folder."""
        if self.trackers:
            self.trackers.close(failed=sys.exc_info()[0] is not None)  # as in `closing`, while an exception passes
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


def checkpoint_of(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:06d}"


def answers_of(run: Path, step: int) -> Path:
    """Where a run keeps the answers of an evaluation."""
    return run / "heldout" / f"step-{step:06d}.jsonl"


def fresh_folder(kind: str) -> Path:
    """runs/<kind>-<time>, with a number where two runs start within a second."""
    name = f"{kind}-{datetime.now():%Y%m%d-%H%M%S}"
    candidates = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 100))]
    return next(path for path in candidates if not path.exists())


def _found(run: Path, name: str) -> Path | None:
    """The checkpoint to resume from. None: there is none yet.

    Raises:
        Refused: the one that was named is damaged.
    """
    if name == NEWEST:
        found = newest_whole(run, lambda text: print(text, file=sys.stderr))
        if not found and (run / "config.yaml").exists():
            print(f"{run} holds no whole checkpoint yet: the run begins anew", file=sys.stderr)
        return found
    found = run / "checkpoints" / name
    try:
        verify(found)
    except Damaged as error:
        raise Refused(f"--resume {found}: is damaged ({error}); --resume {run} takes the one before") from None
    return found


def _cut(log: Path, size: int) -> None:
    """Shorten a log to its first `size` bytes, and to whole lines where it is already shorter."""
    there = log.stat().st_size if log.exists() else 0
    if there < size:
        print(f"{log} has lost {size - there} bytes since the checkpoint was written", file=sys.stderr)
        size = log.read_bytes().rfind(b"\n") + 1 if there else 0
    if log.exists():
        os.truncate(log, size)


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")
